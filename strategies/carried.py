"""What a strategy carries from round to round beside its state and its frozen log, to be written to a checkpoint and read back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsb.core.errors import UserError
from fedsb.core.state import State
from fedsb.run.checkpoint import LABELS, START, Carried, Snapshot

if TYPE_CHECKING:
    from strategies.base import LowRankStrategy

OPTIMIZER, FIRST, LEFT = "server-optimizer", "first-head", "left"
CLIP, HELD, WEIGHTS, COUNTS, ORIGIN, COUNTED = "clip_norm", "held", "weighting", "examples", "origin", "counted"
LOWERED = "lowered"


def remember(strategy: LowRankStrategy) -> Carried:
    """Return what a run goes on with.

    A server optimiser's moments, what changes are measured from, what the wire's rounding left out of the state, what clients
    hold, weights, and a private bound.
    """
    states = {FIRST: strategy.gap.first}
    if len(strategy.sending.left):
        states[LEFT] = strategy.sending.left
    if strategy.server_optimizer is not None:
        states[OPTIMIZER] = strategy.server_optimizer.moments()
    private = strategy.participation.client_unit
    # Sorted: in dispatch order they would be ranked by their numbers of examples, which under this privacy nothing may tell.
    counts = {} if private and not strategy.simulated else dict(sorted(strategy.counts.items()))
    facts = {HELD: dict(sorted(strategy.held.items())), COUNTS: counts, WEIGHTS: strategy.weighting.carried(), ORIGIN: strategy.origin}
    facts |= {LABELS: list(strategy.labels)}
    facts |= {COUNTED: dict(sorted(strategy.counted.items()))} if strategy.counted else {}
    facts |= {LOWERED: dict(sorted(strategy.lowered.items()))} if strategy.lowered else {}
    facts |= {START: list(strategy.start_prints)} if strategy.start_prints else {}
    return Carried(states, facts | ({CLIP: private.bound.value} if private else {}))


def recall(strategy: LowRankStrategy, snapshot: Snapshot) -> None:
    """Set a strategy to go on after the round of ``snapshot``; its arrays are the caller's to pass on.

    Raises:
        UserError: the classes are no longer those of the rounds before: rows of the head would be those of others.
    """
    carried = snapshot.carried
    if (then := carried.facts.get(LABELS, list(strategy.labels))) != list(strategy.labels):
        now = ", ".join(strategy.labels)
        raise UserError(f"the classes of this run are {', '.join(then)}, and the data have {now} now; bring the data back, or begin anew")
    strategy.frozen = snapshot.frozen
    strategy.rounds_done = snapshot.round
    strategy.held = dict(carried.facts[HELD])
    strategy.origin = carried.facts.get(ORIGIN, strategy.origin)
    strategy.counts = dict(carried.facts.get(COUNTS, {}))
    strategy.counted = dict(carried.facts.get(COUNTED, {}))
    strategy.lowered = dict(carried.facts.get(LOWERED, {}))
    strategy.weighting.take_up(carried.facts.get(WEIGHTS, {}))
    strategy.sending.left = carried.states.get(LEFT, State())
    if FIRST in carried.states:
        strategy.gap.measure_from(carried.states[FIRST])
    if strategy.server_optimizer is not None and OPTIMIZER in carried.states:
        strategy.server_optimizer.take_up(carried.states[OPTIMIZER])
    if strategy.participation.client_unit is not None:
        strategy.participation.client_unit.bound.value = carried.facts[CLIP]
