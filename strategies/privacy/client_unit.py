"""Client-level privacy of a whole run: which releases the server makes, with which noise, and which methods it suits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fedsb.config.schema import PrivacyConfig
from fedsb.core.rng import torch_generator
from fedsb.core.state import Layout
from fedsb.privacy.plan import ServerPlan
from fedsb.privacy.randomness import secret_generator
from strategies.privacy.mean import ClippingBound, PrivateMean, PrivateSum

CPU = torch.device("cpu")


@dataclass
class ClientPrivacy:
    """Noise and bounds at the server.

    Attributes:
        bound: on the norm of a client's update; an adaptive one moves from round to round.
        noise_multiplier: z of a round's release.
        seed: names the noise's streams in a simulation.
        start_norm: bound on the norm of a client's sketch.
        start_noise: z of each exchange of a noised start; 0 where the start needs no private data.
        clients: all of them; a start's sums are divided by their number.
        charge: enters a release in the server's ledger, before it is computed: (round, exchange, clients that it covers).
    """

    bound: ClippingBound
    noise_multiplier: float
    seed: int
    start_norm: float = 1.0
    start_noise: float = 0.0
    clients: tuple[str, ...] = ()
    charge: Callable[[int, str, Sequence[str]], None] = lambda round_number, exchange, clients: None

    def check(self) -> None:
        """Hold that there is noise enough for both the sum and an adaptive bound's count.

        Raises:
            UserError: the noise on the count is too small.
        """
        self.bound.sum_multiplier(self.noise_multiplier)

    def mean(self, cohort: Sequence[str], round_number: int, *, real: bool) -> PrivateMean:
        """Return the private mean of a round with a scheduled ``cohort``; noise of a ``real`` federation cannot be repeated."""
        self.charge(round_number, "train", cohort)
        generator = self._generator(f"round-{round_number}", real)
        return PrivateMean(bound=self.bound, noise_multiplier=self.noise_multiplier, cohort=len(cohort), generator=generator)

    def start_sum(self, layout: Layout, number: int, *, real: bool) -> PrivateSum:
        """Return the private sum of an exchange of the start."""
        self.charge(0, f"evidence-{number}", self.clients)
        generator = self._generator(f"start-{number}", real)
        return PrivateSum(layout, clip=self.start_norm, noise_multiplier=self.start_noise, divisor=len(self.clients), generator=generator)

    def _generator(self, release: str, real: bool) -> torch.Generator:
        return secret_generator(CPU) if real else torch_generator(self.seed, "server-noise", release)


def client_unit(privacy: PrivacyConfig, plan: ServerPlan | None, *, seed: int) -> ClientPrivacy | None:
    """Return the mechanism that a configuration and its plan ask for; None without a plan."""
    if plan is None:
        return None
    p = privacy
    adaptive = ClippingBound(p.max_grad_norm, p.quantile, p.quantile_lr, p.count_noise)
    return ClientPrivacy(
        bound=adaptive if p.clipping == "adaptive" else ClippingBound.fixed(p.max_grad_norm),
        noise_multiplier=plan.training.noise_multiplier,
        seed=seed,
        start_norm=p.init_norm,
        start_noise=plan.start.noise_multiplier if plan.start else 0.0,
        clients=tuple(plan.rounds),
    )
