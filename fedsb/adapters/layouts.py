"""Names and shapes of what travels in a run, by direction, turn and rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from fedsb.core.blocks import NOTHING, Block, Sight, leading
from fedsb.core.state import Layout


@dataclass(frozen=True)
class Layouts:
    """Names and shapes of what travels in a run.

    Attributes:
        down: of the state that every client is sent in every round.
        up: of what is uploaded, by turn.
        learnt: of all that is ever trained.
        log: of the factors that come down in the log.
        made: of those that everybody makes.
        asked: of what comes down in a second exchange of a round; nothing where there is none.
        told: of what goes up in it.
        block: where the factors of a smaller rank lie in these.
        narrower: the same of clients with a smaller rank.
    """

    down: Layout
    up: tuple[Layout, ...]
    learnt: Layout
    log: Layout = NOTHING
    made: Layout = NOTHING
    asked: Layout = NOTHING
    told: Layout = NOTHING
    block: Block = field(default=leading, compare=False)
    narrower: Callable[[int], Layouts] | None = field(default=None, compare=False)

    def at(self, rank: int | None) -> Layouts:
        """Return what travels to and from a client of a rank of its own; None: of that which the server has."""
        if rank is None:
            return self
        assert self.narrower is not None
        return self.narrower(rank)

    @cached_property
    def sight(self) -> Sight:
        """What a client with these shapes sees of the factors that the server holds."""
        shapes = {name: shape for layout in (self.down, self.learnt, self.log, self.made) for name, shape in layout.shapes}
        return Sight(Layout(tuple(sorted(shapes.items()))), self.block)

    def up_in(self, round_number: int) -> Layout:
        """Return the layout of an upload after a round."""
        return self.up[(round_number - 1) % len(self.up)]
