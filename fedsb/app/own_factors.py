"""Factors that no message brings: a start that looks at no data, and what begins anew in each round."""

from __future__ import annotations

from fedsb.config.derived import start_kind
from fedsb.config.schema import Config
from fedsb.core.rng import stream_seed
from fedsb.core.state import State
from fedsb.models.adapted import AdaptedModel


def data_free(config: Config, adapted: AdaptedModel, rank: int | None = None) -> State:
    """Return every factor of a start that looks at no data."""
    return _started(config, adapted, config.seed, rank)


def own_start(config: Config, adapted: AdaptedModel, rank: int | None = None) -> State:
    """Return what each client begins with of what is its own: the factors as the start has them, the head as it was built."""
    return adapted.initial.merge(data_free(config, adapted, rank)).pick(*adapted.spec.own)


def fresh_factors(config: Config, adapted: AdaptedModel, round_number: int, rank: int | None = None) -> State:
    """Return the factors that begin anew in a round: the same for every client of a rank, so that nobody has to send them."""
    spec = adapted.spec
    return _started(config, adapted, stream_seed(config.seed, "fresh", round_number), rank).pick(*spec.fresh) if spec.fresh else State()


def _started(config: Config, adapted: AdaptedModel, seed: int, rank: int | None = None) -> State:
    start = adapted.spec.starts[start_kind(config) or ""]
    assert start is not None
    return start(adapted.weights(), rank or config.adapter.rank, seed)
