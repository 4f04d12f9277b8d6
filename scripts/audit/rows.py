"""The rows of the audit that train: one kind of clipping, sampling and computing each, all by the client's own code."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import torch
from exact import Bits, Values
from subject import CANARIES, TASK, Subject, zeroed
from watch import Release, Watch, WatchedTask, watching

import fedsb.privacy.randomness as randomness
from clients.clipping import Clipping
from clients.private import Mechanism, private_lesson
from clients.stacked import taught_together
from fedsb.models.fit import Lesson, Site
from fedsb.privacy.accounting import Entry, calibrate
from fedsb.privacy.adaptive import sum_multiplier
from fedsb.privacy.randomness import Streams
from fedsb.stack.stack import Stack

# Delta is small enough for what an adversary certifies at the error that one of many looks may have.
EPSILON, DELTA = 4.0, 1e-6
# Of the count that adaptive clipping goes by: so small that the sum's share of the noise is far from the whole.
COUNT_NOISE = 2.0
# Runs in which the code's own self-checks run too.
FIRST_ROUNDS = 4


class Row(Protocol):
    """What is audited together.

    Attributes:
        name, covers: in words.
        entry: what the ledger would hold.
        deviation: of the noise on the sum, over C.
        examples: canaries, present or zeroed out.
        sizes: of the tensors of a release, by name; ``client 1: tensor`` in a stack.
        pulls: (examples, values), what each present canary adds to a release, over C.
        attacked: whether enough is released for a lower bound that says something.
        neighbours: examples that are zeroed out alone; None takes some at even distances.
        count_noise: σ_b of adaptive clipping, else None.
        reaches: whether a canary's gradient reaches the bound in every part that is clipped, so that it moves a release by C.
        checked: whether the code's own self-checks run too; off where it is broken on purpose.
    """

    name: str
    covers: str
    entry: Entry
    attacked: bool
    checked: bool
    neighbours: Sequence[int] | None

    @property
    def reaches(self) -> bool: ...
    @property
    def deviation(self) -> float: ...
    @property
    def examples(self) -> int: ...
    @property
    def sizes(self) -> Mapping[str, int]: ...
    @property
    def pulls(self) -> Values: ...
    @property
    def count_noise(self) -> float | None: ...

    def release(self, present: Bits, run: int) -> Release:
        """Run the real code once; a run's number names its randomness."""

    def counted(self, present: Bits, drawn: Bits | None) -> Values:
        """Return the counts without noise."""


def entry_of(rate: float, steps: int) -> Entry:
    """Return what the project would charge for :data:`EPSILON`."""
    return Entry("gaussian", rate, calibrate(EPSILON, DELTA, ((rate, steps),)), steps)


@dataclass
class TrainRow:
    """Private training of one client, or of several side by side.

    Attributes:
        subject: the model.
        kind: of clipping.
        clients: how many side by side; the canaries are dealt out in turn.
        canaries: all of them together.
        how: further settings of :class:`clients.private.Mechanism`.
    """

    name: str
    covers: str
    subject: Subject
    entry: Entry
    kind: str = "flat"
    clients: int = 1
    canaries: int = CANARIES
    how: Mapping[str, Any] | None = None
    attacked: bool = True
    checked: bool = True
    neighbours: Sequence[int] | None = None

    @property
    def clipping(self) -> Clipping:
        return Clipping(self.kind, self.subject.max_norm, self.entry.noise_multiplier, count_noise=COUNT_NOISE)

    @property
    def count_noise(self) -> float | None:
        return COUNT_NOISE if self.kind == "adaptive" else None

    @property
    def reaches(self) -> bool:
        return self.kind != "per_layer"

    @property
    def deviation(self) -> float:
        sigma = self.entry.noise_multiplier
        return sum_multiplier(sigma, COUNT_NOISE) if self.kind == "adaptive" else sigma

    @property
    def examples(self) -> int:
        return self.canaries

    @property
    def owners(self) -> list[range]:
        each = self.canaries // self.clients
        return [range(i * each, (i + 1) * each) for i in range(self.clients)]

    @property
    def sizes(self) -> Mapping[str, int]:
        own = self.subject.sizes
        return own if self.clients == 1 else {f"client {i}: {name}": size for i in range(self.clients) for name, size in own.items()}

    @cached_property
    def pulls(self) -> Values:
        norm, gradients = self.subject.max_norm, self.subject.gradients[: self.canaries]
        tensors = torch.split(gradients, list(self.subject.sizes.values()), dim=1) if self.kind == "per_layer" else (gradients,)
        each = norm / math.sqrt(len(tensors))
        clipped = torch.cat([t * (each / t.norm(dim=1, keepdim=True)).clamp(max=1.0) for t in tensors], dim=1) / norm
        placed = torch.zeros(self.canaries, self.clients, clipped.shape[1], dtype=torch.float64)
        for client, own in enumerate(self.owners):
            placed[own, client] = clipped[own]
        return placed.flatten(1).numpy()

    def release(self, present: Bits, run: int) -> Release:
        data, each = zeroed(self.subject.canaries[: self.canaries], present), len(self.owners[0])
        with watching(self.kind, self.owners) as watch:
            last = self._alone(data, watch, run) if self.clients == 1 else self._together(data, watch, run)
        return watch.release(self.entry.sampling_rate * each, self.clipping, last)

    def counted(self, present: Bits, drawn: Bits | None) -> Values:
        assert drawn is not None
        return np.where(present, -0.5, 0.0) @ drawn.T

    def _alone(self, data: list[dict[str, Any]], watch: Watch, run: int) -> float:
        how = {"charged": self._checked_in(run), **(self.how or {})}
        fit = self.subject.train_once(
            data,
            self.clipping,
            self.entry,
            self._streams(0, run),
            task=WatchedTask(watch, self.subject.canaries),
            site=self._site(0, run),
            **how,
        )
        return fit.diagnostics["clip_norm"]

    def _together(self, data: list[dict[str, Any]], watch: Watch, run: int) -> float:
        self.subject.adapted.install(self.subject.start, self.subject.frozen)
        streams = [self._streams(client, run) for client in range(self.clients)]
        stack, task = Stack(self.subject.adapted, [s.dropout for s in streams]), WatchedTask(watch, self.subject.canaries)
        lessons = {i: self._lesson(stack, i, [data[j] for j in own], streams[i], run) for i, own in enumerate(self.owners)}
        ended = taught_together(stack, task, lessons, train=self.subject.train, private=True)
        if failed := [result for result in ended.values() if isinstance(result, Exception)]:
            raise failed[0]
        return math.nan

    def _lesson(self, stack: Stack, client: int, data: list[dict[str, Any]], streams: Streams, run: int) -> Lesson[Any]:
        adapted, mechanism = self.subject.adapted, Mechanism(self.clipping, self.entry.sampling_rate, self.entry.steps, **(self.how or {}))
        return private_lesson(
            adapted,
            stack.members[client],
            lambda batch: stack.forward_of(client, partial(TASK.forward, adapted.model, batch)),
            TASK,
            data,
            train=self.subject.train,
            site=self._site(client, run),
            mechanism=mechanism,
            streams=streams,
            charged=self._checked_in(run),
        )

    def _checked_in(self, run: int) -> Entry | None:
        """Return what self-checks hold a run against: the first runs are a client's first round, the others later ones, without them."""
        return self.entry if self.checked and run < FIRST_ROUNDS else None

    def _site(self, client: int, run: int) -> Site:
        return Site(0, f"{self.name}-{client}", 1 + run, 1 + run)

    def _streams(self, client: int, run: int) -> Streams:
        return randomness.simulated_streams(0, f"{self.name}-{client}", run, "train", torch.device("cpu"))


def training_rows(subject: Subject) -> list[TrainRow]:
    """Give the rows that train."""
    step, sampled, rare = entry_of(1.0, 1), entry_of(0.5, 4), entry_of(0.25, 4)
    row = partial(TrainRow, subject=subject)
    return [
        row("flat, all examples", "one step on all examples, in two physical batches", entry=step),
        row("flat, sampled", "four Poisson samples of a half", entry=sampled),
        row("per layer", "privacy.clipping=per_layer, sampled", entry=sampled, kind="per_layer"),
        row("adaptive", "privacy.clipping=adaptive, sampled; the noised count too", entry=sampled, kind="adaptive"),
        row("physical batches", "samples that are computed twelve examples at a time", entry=sampled, how={"max_batch": 12}),
        row(
            "constant time",
            "privacy.constant_time: as many physical batches in each step, filled up with made-up examples",
            entry=sampled,
            canaries=16,
            how={"max_batch": 4, "constant_time": True},
        ),
        row("functorch", "privacy.grad_sample_mode=functorch, sampled", entry=sampled, how={"functorch": True}),
        row("empty samples", "four examples, a third of the samples empty", entry=rare, canaries=4, attacked=False),
        row("stack", "four clients side by side, sampled", entry=sampled, clients=4),
    ]
