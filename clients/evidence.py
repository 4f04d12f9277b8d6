"""A client's evidence for the gradient start: products of the mean gradient with thin matrices, without the gradient.

For a linear layer ``y = W0 x`` the gradient over a micro-batch is ``G = δᵀ x`` (m, n) with the tokens' inputs ``x`` (t, n) and output
gradients ``δ`` (t, m). So ``G P = δᵀ (x P)`` and ``Gᵀ Q = xᵀ (δ Q)`` need thin matrices only: they are formed in the backward pass by
hooks, while W0 stays without gradient and no m x n tensor exists at any moment.

Extra memory above a plain backward, with l columns: a right exchange holds the probe P (n, l), the result (m, l) and ``x P`` (t, l) of
every layer from its forward to its backward; a left exchange holds the layers' distinct inputs instead of ``x P``. Both fall with the
micro-batch: up to t = mean(m + n) tokens a right exchange stays below twice the probes and results, 2 · 4 bytes · Σ l (m + n).
Nothing here draws random numbers: the model runs in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from fedsb.adapters import LowRankLayer, adapters_off, layers
from fedsb.adapters.starts import Side
from fedsb.core.state import Name, State
from fedsb.models.backward import first_scale

Batch = TypeVar("Batch")
LossFn = Callable[[nn.Module, Batch], Tensor]
Batches = Sequence[tuple[Batch, int]]


def sketch_gradients(model: nn.Module, batches: Batches[Batch], loss_fn: LossFn[Batch], *, probes: State, side: Side) -> State:
    """Multiply the mean gradient ``G`` = ∂loss/∂W0 (m, n) of every adapted layer by a thin probe.

    The model computes in evaluation mode with its adapters off, so G is taken at W0 (plus a residual, where one is set). Its mode and its
    parameters' ``requires_grad`` are as before afterwards, and no ``.grad`` is written.

    Args:
        model: a model with :class:`~fedsb.adapters.LowRankLayer` layers.
        batches: micro-batches with the number of terms that each loss is the mean of (examples, predicted tokens).
        loss_fn: mean loss over a micro-batch's terms. G is the gradient of the mean over all terms of all micro-batches.
        probes: one tensor a layer, in any role: P (n, l) for ``right``, Q (m, l) for ``left``.
        side: ``right`` for ``G P`` (m, l), role ``Y``; ``left`` for ``Gᵀ Q`` (n, l), role ``Z``.

    Returns:
        float32 tensors on the CPU, accumulated in float32.

    Raises:
        ValueError: the probes aren't those of the model's layers, there is no example, or the loss depends on no adapted layer.
    """
    by_module = {name.module: probe for name, probe in probes.items()}
    return _accumulate(model, batches, loss_fn, product=PRODUCTS[side], probes=by_module)


def dense_gradients(model: nn.Module, batches: Batches[Batch], loss_fn: LossFn[Batch]) -> State:
    """Return the mean gradients themselves, (m, n) in role ``G``; otherwise as :func:`sketch_gradients`.

    For evidence that one party holds (``update=sign`` isn't linear), and to measure a sketch against.
    """
    nothing = dict.fromkeys(layers(model), torch.empty(0))
    return _accumulate(model, batches, loss_fn, product=DENSE, probes=nothing)


@dataclass(frozen=True)
class Product:
    """One way to multiply the gradient, for inputs x (t, n), output gradients δ (t, m) and a probe.

    Attributes:
        role: role of the result.
        shape: (m, n) and the probe to the shape of the result.
        keep: what is held of x from forward to backward.
        pair: (kept, δ, probe) to the pair whose product over the tokens, leftᵀ right, is a micro-batch's part of the result.
    """

    role: str
    shape: Callable[[tuple[int, int], Tensor], tuple[int, int]]
    keep: Callable[[Tensor, Tensor], Tensor]
    pair: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


PRODUCTS: dict[str, Product] = {
    "right": Product(
        role="Y",
        shape=lambda shape, probe: (shape[0], probe.shape[1]),
        keep=lambda x, probe: x.float() @ probe,
        pair=lambda kept, delta, probe: (delta, kept),
    ),
    "left": Product(
        role="Z",
        shape=lambda shape, probe: (shape[1], probe.shape[1]),
        keep=lambda x, probe: x,
        pair=lambda kept, delta, probe: (kept, delta.float() @ probe),
    ),
}
DENSE = Product(
    role="G",
    shape=lambda shape, probe: shape,
    keep=lambda x, probe: x,
    pair=lambda kept, delta, probe: (delta, kept),
)


@dataclass
class Tap:
    """Forward hook on a layer's base: keeps what the product needs of the input, and adds to the result in the backward pass."""

    module: str
    product: Product
    probe: Tensor
    result: Tensor = field(repr=False)

    @classmethod
    def on(cls, module: str, layer: LowRankLayer, product: Product, probe: Tensor) -> Self:
        """Return a tap for a layer, its result zero."""
        where = layer.pristine.device
        probe = probe.to(where, torch.float32)
        return cls(module, product, probe, torch.zeros(product.shape(layer.shape, probe), device=where))

    def __call__(self, base: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Take part in a forward pass; return the output, which requires a gradient now."""
        x = self.rows(inputs[0].detach())
        kept = [self.product.keep(x, self.probe)]
        version = kept[0]._version

        def collect(delta: Tensor) -> None:
            held = kept.pop()  # so that it is free as soon as this layer is done, not when the graph is
            if held._version != version:
                raise RuntimeError(
                    f"the model changes the input of '{self.module}' in place after using it; its gradient can't be sketched"
                )
            self.add(held, self.rows(delta))

        # Where only frozen inputs come in nothing needs a gradient, so the output has to ask for one. A copy goes on: what asks for a
        # gradient may not be written to, and models write into views of what they are given.
        output = output if output.requires_grad else output.detach().requires_grad_().clone()
        output.register_hook(collect)  # type: ignore[no-untyped-call]
        return output

    def rows(self, t: Tensor) -> Tensor:
        """Bring an input or an output gradient into the shape that :meth:`add` takes, (t, n) or (t, m)."""
        return t.reshape(-1, t.shape[-1])

    def add(self, kept: Tensor, delta: Tensor) -> None:
        """Add a micro-batch's part to the result."""
        left, right = self.product.pair(kept, delta, self.probe)
        self.result.addmm_(left.float().T, right.float())


TapT = TypeVar("TapT", bound=Tap)


def make_taps(model: nn.Module, probes: Mapping[str, Tensor], product: Product, kind: type[TapT]) -> dict[str, TapT]:
    """Return a tap for every adapted layer by module name, not hooked yet.

    Raises:
        ValueError: the probes aren't those of the model's layers.
    """
    adapted = layers(model)
    if adapted.keys() != probes.keys():
        raise ValueError(f"probes for {sorted(probes)} don't fit the adapted layers {sorted(adapted)}")
    return {name: kind.on(name, layer, product, probes[name]) for name, layer in adapted.items()}


def _accumulate(model: nn.Module, batches: Batches[Batch], loss_fn: LossFn[Batch], *, product: Product, probes: dict[str, Tensor]) -> State:
    total = sum(count for _, count in batches)
    if total <= 0:
        raise ValueError("the gradient start needs at least one example")
    scale = first_scale(model)
    while True:
        taps = make_taps(model, probes, product, Tap)
        with tapped(model, taps), torch.enable_grad():
            for batch, count in batches:
                backward(loss_fn(model, batch) * (scale * count / total))
        if scale == 1.0 or all(bool(tap.result.isfinite().all()) for tap in taps.values()):
            return State({Name(name, product.role): (tap.result / scale).cpu() for name, tap in taps.items()})
        scale /= 2.0


def backward(loss: Tensor) -> None:
    """Run a scalar loss's backward pass through the taps.

    Raises:
        ValueError: the loss depends on no adapted layer.
    """
    # A function of its own, so that no graph of one micro-batch is alive in the forward pass of the next.
    if not loss.requires_grad:
        raise ValueError("the loss depends on no adapted layer")
    loss.backward()  # type: ignore[no-untyped-call]


@contextmanager
def tapped(model: nn.Module, taps: Mapping[str, Tap]) -> Iterator[None]:
    """Hook the layers' bases, the model in evaluation mode, adapters off and every parameter frozen; undo all of it after."""
    adapted = layers(model)
    training = {module: module.training for module in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [adapted[name].base.register_forward_hook(tap) for name, tap in taps.items()]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with adapters_off(model):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, mode in training.items():
            module.training = mode
