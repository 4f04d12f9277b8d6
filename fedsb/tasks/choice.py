"""Multiple choice by likelihood: which of the given answers a model finds likeliest behind a prompt; nothing is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """A question with its answers.

    Attributes:
        likelihoods: log-likelihood of each answer behind the prompt, in nats, without the token that ends it.
        lengths: characters of each answer.
        right: index of the right one.

    Raises:
        ValueError: the right one is none of them, or an answer has no likelihood or no length.
    """

    likelihoods: tuple[float, ...]
    lengths: tuple[int, ...]
    right: int

    def __post_init__(self) -> None:
        """Hold that the right answer is one of those that are looked at."""
        if not 0 <= self.right < len(self.likelihoods) or len(self.likelihoods) != len(self.lengths) or min(self.lengths) < 1:
            raise ValueError(f"{len(self.likelihoods)} likelihoods, lengths {self.lengths}, and {self.right} is right")

    def chosen(self, *, normalised: bool) -> int:
        """Return the index of the likeliest answer, the first of equals: by the whole, or by a character of it, as lm-eval's acc_norm."""
        by = [value / length for value, length in zip(self.likelihoods, self.lengths, strict=True)] if normalised else self.likelihoods
        return max(range(len(by)), key=by.__getitem__)


def choice_items(rows: Sequence[Choice]) -> dict[str, list[bool]]:
    """Return of each question whether it is answered right, by the likelihood of a character and of the whole answer."""
    return {
        "accuracy_norm": [row.chosen(normalised=True) == row.right for row in rows],
        "accuracy": [row.chosen(normalised=False) == row.right for row in rows],
    }


def choice_metrics(rows: Sequence[Choice]) -> dict[str, float]:
    """Return the share answered right, by the likelihood of a character and of the whole answer, and what guessing would score."""
    count = len(rows)
    return {
        "accuracy_norm": sum(row.chosen(normalised=True) == row.right for row in rows) / count,
        "accuracy": sum(row.chosen(normalised=False) == row.right for row in rows) / count,
        "choice_chance": sum(1 / len(row.likelihoods) for row in rows) / count,
        "examples": float(count),
    }
