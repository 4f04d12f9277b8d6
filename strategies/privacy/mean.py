"""Privacy of whole clients at a trusted server: clipped updates, equal weights, Gaussian noise on the sum, a fixed divisor.

McMahan et al. 2018 (arXiv:1710.06963); the bound may follow a quantile of the clients' norms (Andrew et al. 2021, arXiv:1905.03871).
Adjacent: one client's contribution replaced by zero. Readers of what is released are kept from a client's data, the server is not.
The accountant sees one Gaussian of ``noise_multiplier`` a release; floating-point attacks on the sampler are not covered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch

from fedsb.core.errors import UserError
from fedsb.core.state import Layout, State, squared_norm, subtract
from fedsb.privacy.adaptive import sum_multiplier
from strategies.reducers import Aggregate


@dataclass
class ClippingBound:
    """The bound C on the norm of a client's update. It moves from round to round, so one object serves the whole run.

    A client that does not answer adds nothing to the count, as if it were half within the bound: with the share ``a`` answering,
    C goes to the quantile ``1/2 + (γ − 1/2) / a``. Where that is outside [0, 1], C grows or shrinks without end; γ = 1/2 is immune.

    Attributes:
        value: C.
        quantile: γ, the share of clients that C should leave unclipped; None keeps C fixed.
        rate: η of the geometric update.
        count_noise: σ_b, standard deviation of the noise on the count of clients within the bound.

    Raises:
        UserError: a value outside its range.
    """

    value: float
    quantile: float | None = None
    rate: float = 0.0
    count_noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.value < math.inf:
            raise UserError(f"a clipping norm of {self.value} must be finite and above 0")
        if self.quantile is not None and not 0 < self.quantile < 1:
            raise UserError(f"privacy.quantile={self.quantile} must lie between 0 and 1; 0.5 clips half of the clients")
        if not (0 <= self.rate < math.inf and 0 <= self.count_noise < math.inf):
            raise UserError(f"privacy.quantile_lr={self.rate} and privacy.count_noise={self.count_noise} must be finite, at least 0")

    @classmethod
    def fixed(cls, value: float) -> ClippingBound:
        """Return a bound that stays."""
        return cls(value)

    def sum_multiplier(self, noise_multiplier: float) -> float:
        """Return ``z_Δ = (z^-2 − (2 σ_b)^-2)^(-1/2)``: with it, sum and count together cost one Gaussian release of multiplier z.

        Raises:
            UserError: the count alone would cost as much as both may.
        """
        return noise_multiplier if self.quantile is None else sum_multiplier(noise_multiplier, self.count_noise)

    def update(self, count: float, cohort: int, generator: torch.Generator) -> None:
        """Move C towards its quantile; a fixed one stays and draws nothing.

        Args:
            count: ``Σ (1[norm <= C] − 1/2)`` over the clients that answered: one client changes it by 1/2.
            cohort: the scheduled number of clients.
            generator: where the noise comes from.
        """
        if self.quantile is not None:
            noise = self.count_noise * float(torch.randn((), generator=generator, dtype=torch.float64))
            self.value *= math.exp(-self.rate * ((count + noise) / cohort + 0.5 - self.quantile))


class PrivateSum:
    """A noised sum of states, one a client, each clipped jointly over all of its tensors; its mean has a fixed divisor.

    A ``generator`` that restarted at the same point for each release would draw the same noise again, and the difference of two
    releases would be bare: name its stream by round and exchange, or let it run on.

    Args:
        layout: names and shapes; a sum of nothing is noise of this layout.
        clip: C, the L2 norm that one state may have.
        noise_multiplier: standard deviation of the noise on the sum, in units of C.
        divisor: the number of clients asked. The number that answered would change with one client, beyond what the noise covers.
        generator: where the noise comes from.

    Raises:
        UserError: a noise multiplier or a divisor outside its range.
    """

    def __init__(self, layout: Layout, *, clip: float, noise_multiplier: float, divisor: int, generator: torch.Generator) -> None:
        if not 0 <= noise_multiplier < math.inf:
            raise UserError(f"privacy.noise_multiplier={noise_multiplier} must be finite and at least 0")
        if divisor < 1:
            raise UserError(f"a private mean over {divisor} clients is not defined; ask at least 1")
        self._layout = layout
        self._clip = clip
        self._std = noise_multiplier * clip
        self._divisor = divisor
        self._generator = generator
        self._sum = State({name: torch.zeros(shape, dtype=torch.float64) for name, shape in layout.shapes})
        self._released = False

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each entry of the mean."""
        return self._std / self._divisor

    @property
    def signal_to_noise(self) -> float:
        """Norm of the sum over that expected of its noise; infinite without noise. Not private: for simulations only."""
        scale = self._std * math.sqrt(self._layout.numel)
        return math.sqrt(squared_norm(self._sum)) / scale if scale else math.inf

    def add(self, state: State) -> float:
        """Add a client's state, clipped, or zero where its norm is not finite; return that norm, which is not private.

        Raises:
            ValueError: the state is of another layout.
        """
        if difference := self._layout.difference(Layout.of(state)):
            raise ValueError(f"a state does not fit the private sum: {difference}")
        norm = math.sqrt(squared_norm(state))
        if math.isfinite(norm):
            factor = self._clip / norm if norm > self._clip else 1.0
            for name, t in state.items():
                self._sum[name].add_(t.detach().to("cpu", torch.float64), alpha=factor)
        return norm

    def mean(self) -> State:
        """Return (sum + noise) / divisor in float64; once, as fresh noise on the same sum would be a second release."""
        assert not self._released
        self._released = True
        noise = self._sum.map(lambda t: torch.randn(t.shape, generator=self._generator, dtype=torch.float64))
        return State({name: (t + self._std * noise[name]) / self._divisor for name, t in self._sum.items()})


class PrivateMean:
    """What clients were sent, plus the private mean of their updates, head included.

    Attributes:
        diagnostics: ``clip_rate`` of those that answered, and ``signal_to_noise``. Not private: only a simulation may show them.

    Args:
        bound: the clipping bound; :meth:`finish` moves an adaptive one.
        noise_multiplier: z of the round's release; an adaptive bound's count is part of it.
        cohort: the scheduled number of clients.
        generator: where the noise comes from; see :class:`PrivateSum`.
    """

    def __init__(self, *, bound: ClippingBound, noise_multiplier: float, cohort: int, generator: torch.Generator) -> None:
        self._bound = bound
        multiplier = bound.sum_multiplier(noise_multiplier)
        self._new_sum = partial(PrivateSum, noise_multiplier=multiplier, divisor=cohort, generator=generator)
        self._cohort = cohort
        self._generator = generator
        self.diagnostics: dict[str, float] = {}
        self.begin(State())

    def begin(self, current: State) -> None:
        """Start an empty sum of updates of ``current``."""
        self._current = current.map(torch.Tensor.double)
        self._total = self._new_sum(Layout.of(current), clip=self._bound.value)
        self._weight: float | None = None
        self._within: list[bool] = []

    def add(self, upload: State, weight: float) -> None:
        """Add an update, clipped. The mechanism knows no ``weight``: a ValueError where two differ."""
        if self._weight not in (None, weight):
            raise ValueError(f"weights {self._weight} and {weight} in one private round; use federation.weighting=uniform")
        self._weight = weight
        # Widened before the difference: that of two float32 values may overflow.
        norm = self._total.add(subtract(upload.map(torch.Tensor.double), self._current))
        # An update of zero counts for nothing, as a client that is not there: zeroing one out moves the count by 1/2, not by 1.
        self._within += [norm <= self._bound.value] if 0 < norm < math.inf else []

    def finish(self) -> Aggregate:
        """Return what the clients were sent plus the private mean, and move the bound. The extras are public or private themselves."""
        inside, count = sum(self._within), len(self._within)
        self.diagnostics = {"clip_rate": 1 - inside / count if count else 0.0, "signal_to_noise": self._total.signal_to_noise}
        extras = {"clip_norm": self._bound.value, "noise_std": self._total.noise_std}
        mean = self._total.mean()
        state = State({name: t + mean[name] for name, t in self._current.items()})
        self._bound.update(inside - count / 2, self._cohort, self._generator)
        return Aggregate(state, extras=extras)
