"""The gradient sketch's client half under differential privacy: every example's products are clipped before they are summed.

For one example with the tokens' inputs ``x_i`` (t, n) and output gradients ``δ_i`` (t, m) of a layer, ``G_i P = δ_iᵀ (x_i P)`` and
``G_iᵀ Q = x_iᵀ (δ_i Q)``. They are formed by the hooks of ``clients/evidence.py``, one product an example, clipped jointly over all layers
to norm C, and summed. Removing (zeroing out) one example changes the sum by at most C, if its loss depends on nobody else: a mean over a
batch's examples or tokens would break that, and so would a layer that mixes examples.

Extra memory above a plain backward, for a micro-batch of b examples and l columns: all examples' products, b · Σ l·m floats (``left``:
b · Σ l·n), from the backward pass until they are summed, beside what ``clients/evidence.py`` keeps for the backward pass; the sum in
float64; one layer's products in float64. No m x n tensor exists at any moment.

What the noise does not cover stays at the client: :attr:`ClippedSum.num_clipped`, and the un-noised sum itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clients.evidence import PRODUCTS, Batch, Tap, backward, make_taps, tapped
from fedsb.adapters.starts import Side
from fedsb.core.state import Name, State
from fedsb.privacy.adaptive import MARGIN
from fedsb.privacy.sampling import drawn_rate


@dataclass(frozen=True)
class ClippedSum:
    """A sum of clipped products, before noise.

    Attributes:
        sum: float64 on the CPU, role ``Y`` (m, l) or ``Z`` (n, l); zeros for an empty sample.
        num_clipped: examples whose norm exceeded C or was not finite. A function of the data that no noise covers.
        num_examples: examples that were drawn, as private as the sample.
    """

    sum: State
    num_clipped: int
    num_examples: int


def clipped_sketch(
    model: nn.Module,
    batches: Sequence[Batch],
    losses: Callable[[nn.Module, Batch], Tensor],
    *,
    probes: State,
    side: Side,
    max_norm: float,
    normalise: bool = False,
) -> ClippedSum:
    """Sum the examples' clipped products of ``G_i`` = ∂loss_i/∂W0 with a thin probe.

    The model computes in evaluation mode with its adapters off, so G_i is taken at W0 (plus a residual, where one is set). Its mode and
    its parameters' ``requires_grad`` are as before afterwards, and no ``.grad`` is written. An example whose products are not finite
    contributes nothing.

    Args:
        model: a model with :class:`~fedsb.adapters.LowRankLayer` layers, each of which is given (b, …, n).
        batches: micro-batches of the examples drawn; none at all for an empty sample.
        losses: one loss per example, (b,), each a function of its own example alone. Their sum is backpropagated.
        probes: one tensor a layer, in any role: P (n, l) for ``right``, Q (m, l) for ``left``.
        side: ``right`` for ``G_i P`` (m, l), role ``Y``; ``left`` for ``G_iᵀ Q`` (n, l), role ``Z``.
        max_norm: C, of an example's products over all layers together.
        normalise: scale every example to norm C, also the shorter ones; one of norm zero stays zero.

    Raises:
        ValueError: the probes aren't those of the model's layers, C isn't positive, the losses aren't one per example or depend on no
            adapted layer, or a layer's input has another first dimension than the losses.
    """
    if not 0 < max_norm < math.inf:
        raise ValueError(f"max_norm={max_norm} has to be positive and finite")
    taps = make_taps(model, {name.module: probe for name, probe in probes.items()}, PRODUCTS[side], ExampleTap)
    total = _Total(max_norm, normalise, {name: tap.result.double() for name, tap in taps.items()})
    with tapped(model, taps), torch.enable_grad():
        for batch in batches:
            # Neither graph nor products get a name here: they would live through the next micro-batch's forward pass.
            total.add(_products(losses(model, batch), taps))
    sums = State({Name(name, PRODUCTS[side].role): t.cpu() for name, t in total.sums.items()})
    return ClippedSum(sums, total.num_clipped, total.num_examples)


def add_noise(total: ClippedSum, *, noise_multiplier: float, max_norm: float, expected: float, generator: torch.Generator) -> State:
    """Return ``(sum + N(0, (σ C)²)) / expected``: the release of one exchange, in float32.

    It is rounded once the noise is in it: a rounded sum could move by more than C where one example comes or goes.

    Args:
        total: of :func:`clipped_sketch`, with the same ``max_norm``.
        noise_multiplier: σ, in units of the sensitivity C.
        max_norm: C.
        expected: expected number of examples, q n. The number drawn is private, so nothing is divided by it.
        generator: draws on the CPU, tensor by tensor in sorted order. Whoever knows its state can subtract the noise.

    Raises:
        ValueError: σ or C is negative, or ``expected`` isn't positive.
    """
    if not (noise_multiplier >= 0 and max_norm >= 0 and expected > 0):
        raise ValueError(f"noise_multiplier={noise_multiplier} and max_norm={max_norm} have to be at least 0, expected={expected} above 0")
    deviation = noise_multiplier * max_norm

    def noised(t: Tensor) -> Tensor:
        return ((t.double() + deviation * torch.randn(t.shape, generator=generator, dtype=torch.float64)) / expected).float()

    return total.sum.map(noised)


def poisson_sample(num_examples: int, rate: float, generator: torch.Generator) -> list[int]:
    """Draw each of the indices below ``num_examples`` independently with probability :func:`drawn_rate` of ``rate``; ascending.

    Raises:
        ValueError: ``rate`` isn't a probability.
    """
    # Seconds to import, and only private clients sample.
    from opacus.utils.uniform_sampler import UniformWithReplacementSampler

    if not 0 <= rate <= 1:
        raise ValueError(f"rate={rate} has to be between 0 and 1")
    if num_examples == 0:
        return []
    # Despite its name nothing is drawn twice in a step.
    sampler = UniformWithReplacementSampler(num_samples=num_examples, sample_rate=drawn_rate(rate), generator=generator, steps=1)
    drawn: list[int] = next(iter(sampler))
    return drawn


class ExampleTap(Tap):
    """A tap with a product for each example of the micro-batch under way: ``result`` is (b, m, l) or (b, n, l)."""

    def rows(self, t: Tensor) -> Tensor:
        """Return (b, t, n) or (b, t, m) for the t tokens of each example."""
        return t.unsqueeze(1) if t.dim() == 2 else t.flatten(1, -2)

    def begin(self, examples: int) -> None:
        """Make room for the products of a micro-batch."""
        self.result = self.result.new_zeros(examples, *self.result.shape[-2:])

    def take(self) -> Tensor:
        """Hand the products over, and hold none."""
        products = self.result
        self.begin(0)
        return products

    def add(self, kept: Tensor, delta: Tensor) -> None:
        """Add the part of one call of the layer to the examples' products."""
        if len(kept) != len(self.result):
            # Rows that belong to nobody in particular can't be clipped by example.
            raise ValueError(
                f"'{self.module}' is given {len(kept)} rows for {len(self.result)} examples; its input has to be (examples, …, n)"
            )
        left, right = self.product.pair(kept, delta, self.probe)
        self.result.baddbmm_(left.float().mT, right.float())


def _products(losses: Tensor, taps: dict[str, ExampleTap]) -> list[tuple[str, Tensor]]:
    if losses.dim() != 1:
        raise ValueError(f"the losses have shape {tuple(losses.shape)}; private evidence needs one loss per example, (examples,)")
    for tap in taps.values():
        tap.begin(len(losses))
    if len(losses):
        backward(losses.sum())
    return [(name, tap.take()) for name, tap in taps.items()]


@dataclass
class _Total:
    """The running sum, in float64: there no float32's square underflows, and a norm that came out too small would let more than C in."""

    max_norm: float
    normalise: bool
    sums: dict[str, Tensor]
    num_clipped: int = 0
    num_examples: int = 0

    def add(self, products: list[tuple[str, Tensor]]) -> None:
        norms = torch.stack([torch.linalg.vector_norm(t, dim=(1, 2), dtype=torch.float64) for _, t in products]).norm(dim=0)
        factors = self.factors(norms)
        for name, t in products:
            # A factor of 0 does not remove NaN or infinity.
            t.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            self.sums[name] += torch.tensordot(factors, t.double(), dims=1)
        self.num_clipped += int((~(norms <= self.max_norm)).sum())
        self.num_examples += len(norms)

    def factors(self, norms: Tensor) -> Tensor:
        scale = MARGIN * self.max_norm / norms
        scale = scale if self.normalise else scale.clamp(max=1.0)
        return torch.where(norms.isfinite() & (norms > 0), scale, 0.0)
