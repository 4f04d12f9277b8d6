"""What a message asks of a node, and how it is told that it asks for too much."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedsb.config.schema import Config
from fedsb.core.errors import UserError


class PolicyError(UserError):
    """A run asks for what the operator of a node does not allow.

    Args:
        message: the line.
        key: of the run's configuration.
        code: key of :data:`fedsb.privacy.codes.CODES`.
    """

    def __init__(self, message: str, *, key: str | None = None, code: str = "policy") -> None:
        super().__init__(message, key=key)
        self.code = code


@dataclass(frozen=True)
class Request:
    """What a message asks for.

    Attributes:
        config: of its run, as the server gives it.
        labels: the classes that the server names.
        unnoised: why the run's start has no noise; None where it has, or needs none.
        count: the client's training examples, once it is known.
        evaluation: whether the message asks for metrics on what is held out.
    """

    config: Config
    labels: tuple[str, ...] = ()
    unnoised: str | None = None
    count: int | None = None
    evaluation: bool = False

    @property
    def steps(self) -> int | None:
        """Steps of a round; None where they follow from a number of examples that is not known yet."""
        train = self.config.train
        if train.local_steps is not None:
            return train.local_steps
        return None if self.count is None else train.local_epochs * math.ceil(self.count / train.batch_size)

    @property
    def examples(self) -> int | None:
        """Examples that the steps of a round read, at most."""
        train = self.config.train
        if self.count is None:
            return None
        if train.local_steps is not None:
            return train.local_steps * min(train.batch_size, self.count)
        return train.local_epochs * self.count

    @property
    def epochs(self) -> float | None:
        """Passes over the client's examples in a round."""
        train = self.config.train
        if train.local_steps is None:
            return train.local_epochs
        return None if self.examples is None else self.examples / max(1, self.count or 0)
