"""What a method gives, a rule and what it adds to the frozen log, and what it may be combined with, which follows from the rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from fedsb.adapters import AdapterSpec, Layouts
from fedsb.core.state import Layout, Name, State
from strategies.reducers import Aggregate, Reducer


class Method:
    """A rule, over the uploads' mean (:meth:`follow`) or over all of them (:meth:`over_uploads`).

    Attributes:
        spec: the adapter family.
        layouts: names and shapes of what travels.
        any_rank: whether the rule takes uploads of several ranks.
        anew: factors that the rule makes anew in each round: what rounding left out of an upload of one says nothing of the next.
    """

    spec: AdapterSpec
    layouts: Layouts
    any_rank: ClassVar[bool] = False
    anew: ClassVar[tuple[str, ...]] = ()

    def follow(self, mean: State, held: State) -> Aggregate:
        """Return what a round leads to: the rule of a method that needs no more than the mean of its uploads.

        Args:
            mean: of the uploads, in float64.
            held: what all clients held of the factors when the round began, those that rested in it too.
        """
        return Aggregate(mean)

    def over_uploads(self) -> Reducer | None:
        """Return the rule of a method that needs each upload; None where :meth:`follow` is the rule."""
        return None

    def residual_rank(self, ranks: Sequence[int]) -> int:
        """Return the rank of what a round of clients with these ranks adds to a module's W0."""
        return 0

    def lower_rank(self, upload: State, sent: State) -> int | None:
        """Return the smaller rank that a client goes on with; None: the one that it has.

        Args:
            upload: of the client, as it was trained.
            sent: what it began from.
        """
        return None

    def growth(self, round_number: int, shapes: Mapping[str, tuple[int, int]], ranks: Sequence[int]) -> Layout:
        """Return names and shapes of what a round adds to the log: factors that learnt and live there, and a residual."""
        rank = self.residual_rank(ranks) if ranks else 0
        residual = {Name(module, role): shape for module, (m, n) in shapes.items() for role, shape in (("U", (m, rank)), ("V", (rank, n)))}
        logged = {name: shape for name, shape in self.layouts.up_in(round_number).shapes if name.role in self.spec.in_log}
        return Layout(tuple(sorted({**logged, **(residual if rank else {})}.items())))

    @classmethod
    def adds_to_weights(cls) -> bool:
        """Tell whether rounds add to W0 by the frozen log."""
        return cls.residual_rank is not Method.residual_rank

    @classmethod
    def needs_a_mean_alone(cls) -> bool:
        """Tell whether the method's result follows from the mean of the uploads."""
        return cls.over_uploads is Method.over_uploads

    @classmethod
    def is_the_mean(cls) -> bool:
        """Tell whether the method's result is the mean of the uploads itself."""
        return cls.needs_a_mean_alone() and cls.follow is Method.follow

    @property
    def redraws(self) -> bool:
        """Whether components of A and B at weight zero are drawn, and need not be sent."""
        return False

    @property
    def spends_less(self) -> bool:
        """Whether a run may move fewer bytes than its shapes say, as its data have it."""
        return self.redraws

    @property
    def has_global_model(self) -> bool:
        """Whether no client keeps a part of the model for itself."""
        return self.spec.has_global_model

    @property
    def is_exact(self) -> bool:
        """Whether every client holds the mean of the trained weights after a round: a mean is exact where one factor learns at a time."""
        return (
            self.has_global_model
            and self.is_the_mean()
            and all(len(self.spec.uploaded(turn)) <= 1 for turn in range(1, self.spec.turns + 1))
        )


class Following:
    """A mean of uploads, and what a method makes of it.

    Args:
        mean: makes it.
        method: the method.
        held: what all clients hold of the factors as the round begins.
    """

    def __init__(self, mean: Reducer, method: Method, held: State) -> None:
        self._mean = mean
        self._method = method
        self._held = held
        self.begin = mean.begin
        self.add = mean.add

    @property
    def diagnostics(self) -> dict[str, float]:
        """What the mean knows of how it was made, and no noise covers."""
        return dict(getattr(self._mean, "diagnostics", {}))

    def finish(self) -> Aggregate:
        """Return what the method makes of the mean, with the mean's own figures."""
        made = self._mean.finish()
        found = self._method.follow(made.state, self._held)
        return Aggregate(found.state, found.log, {**made.extras, **found.extras})
