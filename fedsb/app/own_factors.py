"""Factors that no message brings: a start that looks at no data, what of it everybody makes, and what begins anew in each round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fedsb.config.derived import start_kind
from fedsb.config.schema import Config
from fedsb.core.errors import UserError
from fedsb.core.prints import ALIKE, distance, prints
from fedsb.core.rng import stream_seed
from fedsb.core.state import State
from fedsb.models.adapted import AdaptedModel
from fedsb.run.checkpoint import START, Snapshot
from fedsb.run.kept_start import KeptStart


@dataclass(frozen=True)
class Made:
    """A start of which some factors are made by everybody.

    Attributes:
        whole: every factor of it.
        factors: those that everybody makes, alike up to rounding.
        prints: of these, for two parties to compare.
    """

    whole: State = field(default_factory=State)
    factors: State = field(default_factory=State)
    prints: tuple[float, ...] = ()

    def unlike(self, prints: Sequence[float]) -> str:
        """Say by how much it differs from what has other prints; nothing where it is alike."""
        differs = distance(self.prints, prints)
        return "" if differs <= ALIKE else f"{differs:.1e} of its norm ({ALIKE:.0e} is allowed)"


def made_factors(config: Config, adapted: AdaptedModel, kept: KeptStart | None = None) -> Made:
    """Return what everybody makes at the run's rank, computed once a process; nothing where the family has nothing of the kind.

    Args:
        config: names the start, its seed and its rank.
        adapted: gives W0.
        kept: where it may lie already, and is left for the next process.
    """
    if not adapted.spec.made:
        return Made()

    def make() -> Made:
        found = kept.read(adapted.layouts.made) if kept else None
        whole = _started(config, adapted, config.seed) if found is None else found
        if kept and found is None:
            kept.write(whole)
        factors = whole.pick(*adapted.spec.made).map(Tensor.contiguous)  # as they would lie if they had been sent: no last bit tells
        return Made(whole, factors, prints(factors, config.seed))

    return adapted.once((start_kind(config), config.seed, config.adapter.rank), make)


def made_again(config: Config, adapted: AdaptedModel, snapshot: Snapshot) -> State:
    """Return what everybody makes, for a run to go on, or to be looked at.

    Raises:
        UserError: it is not what the run was trained with.
    """
    made = made_factors(config, adapted)
    if wrong := made.unlike(snapshot.carried.facts.get(START, ())):
        raise UserError(
            f"the start of this run, as computed here, differs by {wrong} from what it was trained with; use the machine and the versions "
            "that it was begun with"
        )
    return made.factors


def data_free(config: Config, adapted: AdaptedModel, rank: int | None = None) -> State:
    """Return every factor of a start that looks at no data."""
    whole = adapted.spec.made and (rank or config.adapter.rank) == config.adapter.rank
    return made_factors(config, adapted).whole if whole else _started(config, adapted, config.seed, rank)


def own_start(config: Config, adapted: AdaptedModel, rank: int | None = None) -> State:
    """Return what each client begins with of what is its own: the factors as the start has them, the head as it was built."""
    return adapted.initial.merge(data_free(config, adapted, rank)).pick(*adapted.spec.own)


def fresh_factors(config: Config, adapted: AdaptedModel, round_number: int, rank: int | None = None) -> State:
    """Return the factors that begin anew in a round: the same for every client of a rank, so that nobody has to send them."""
    spec = adapted.spec
    return _started(config, adapted, stream_seed(config.seed, "fresh", round_number), rank).pick(*spec.fresh) if spec.fresh else State()


def _started(config: Config, adapted: AdaptedModel, seed: int, rank: int | None = None) -> State:
    kind = start_kind(config) or ""
    start, rescale = adapted.spec.starts[kind], adapted.spec.shifting.get(kind)
    assert start is not None
    made = start(adapted.weights(), rank or config.adapter.rank, seed)
    return rescale(made, adapted.scale) if rescale else made
