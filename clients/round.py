"""A client's round of training, from what it starts from to what it uploads.

There is one course of a round. Kinds of training differ in what they do to open and close it and in the lesson between, and who teaches
the lesson, to one client alone or to several side by side, is none of the round's business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Generic

import torch
from torch import Tensor, nn

from fedsb.config.schema import TrainConfig
from fedsb.core.state import Name, State
from fedsb.models.adapted import AdaptedModel
from fedsb.models.fit import Features, FitResult, Lesson, Result, Site, dropout_of, fit, fit_lesson
from fedsb.tasks.task import Batch, Task
from fedsb.wire.frozen import FrozenView
from fedsb.wire.rounded_uploads import Rounding

Parameters = Mapping[Name, nn.Parameter]


@dataclass(frozen=True)
class Upload:
    """What a round ends with.

    Attributes:
        sent: what goes to the server, as the wire's rounding leaves it.
        metrics: what the reply says beside it.
        own: what the client keeps for itself until its next round.
    """

    sent: State
    metrics: Mapping[str, float]
    own: State = field(default_factory=State)


@dataclass(kw_only=True)
class Round(ABC, Generic[Result]):
    """One client's round.

    Attributes:
        adapted: the model, on which nothing of this client need be installed before the round is open.
        task: gives the loss.
        features: all of the client's tokenised examples.
        train: optimiser, schedule, lengths.
        site: client, round and seed.
        frozen: gives the frozen part that the round is based on, or raises where the client lacks some.
        keep_own: keeps what of the trained factors is the client's own; it comes before anything that makes a reply a kept one.
        rounding: what becomes of the upload on its way.
        keep_left: keeps what that leaves out for the client's next upload; likewise.
    """

    by_example: ClassVar[bool] = False  # whether its lesson asks for the gradient of each example

    adapted: AdaptedModel
    task: Task
    features: Features
    train: TrainConfig
    site: Site
    frozen: Callable[[], FrozenView]
    keep_own: Callable[[State], None] = lambda own: None
    rounding: Rounding = field(default_factory=Rounding)
    keep_left: Callable[[State], None] = lambda left: None

    @cached_property
    def held(self) -> FrozenView:
        """The frozen part that the round is based on."""
        return self.frozen()

    @property
    @abstractmethod
    def dropout(self) -> torch.Generator:
        """Draws the dropout of this client and round."""

    @abstractmethod
    def open(self) -> Upload | None:
        """Make the round ready to be taught; return what was uploaded to the same request before, where it was."""

    @abstractmethod
    def lesson(self, trained: Parameters, forward: Callable[[Batch], Tensor]) -> Lesson[Result]:
        """Return the lesson of an open round.

        Args:
            trained: what learns, of the model itself or of one that shares its frozen weights.
            forward: gives the outputs with the values of ``trained``.
        """

    @abstractmethod
    def taught(self) -> Result:
        """Teach the lesson to this client alone, on the model that holds its state."""

    @abstractmethod
    def metrics(self, result: Result) -> dict[str, float]:
        """Return what a reply says of how the lesson went."""

    def close(self, trained: State, result: Result) -> Upload:
        """Return what an open round ends with, its own state kept.

        Args:
            trained: what the lesson has left, by name.
            result: what it ended with.
        """
        rounded = self.rounding.of(self.adapted.sent(trained, self.site.round))
        told = self._told_of(trained, rounded.decoded)
        upload = Upload(rounded.sent, {**self.metrics(result), **told}, self.adapted.kept(trained))
        self.keep_own(upload.own)
        self.keep_left(rounded.left)
        return upload

    def _told_of(self, trained: State, decoded: State) -> dict[str, float]:
        if self.rounding.dtype == "float32":
            return {}
        return {"encoding-error": self.adapted.encoding_error(trained, self.site.round, decoded)}

    def alone(self, state: State) -> Upload:
        """Take a client through its round alone.

        Args:
            state: what it starts from, but for what it holds from the log.
        """
        if (kept := self.open()) is not None:
            return kept
        self.adapted.install(state, self.held, self.site.round)
        result = self.taught()
        return self.close(self.adapted.trained(), result)


class PlainRound(Round[FitResult]):
    """Training without privacy of the client's own."""

    @property
    def dropout(self) -> torch.Generator:
        """Draws the dropout of this client and round."""
        return dropout_of(self.site)

    def open(self) -> None:
        """Take in what the round is based on."""
        _ = self.held

    def lesson(self, trained: Parameters, forward: Callable[[Batch], Tensor]) -> Lesson[FitResult]:
        """Return the lesson; it asks for mean gradients of batches."""
        return fit_lesson(trained, self.features, train=self.train, site=self.site)

    def taught(self) -> FitResult:
        """Teach the lesson to this client alone."""
        return fit(self.adapted, self.task, self.features, train=self.train, site=self.site)

    def metrics(self, result: FitResult) -> dict[str, float]:
        """Return mean loss and number of steps."""
        return {"loss": result.loss, "steps": result.steps}
