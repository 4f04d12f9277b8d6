"""The rows of the audit that do not train a client: the private start at a client, and the server's sums under ``privacy=client``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from exact import Bits, Values
from rows import COUNT_NOISE, DELTA, entry_of
from subject import TASK, Subject, flat, short, zeroed
from watch import Release, Watch, WatchedTask

import clients.private_start as private_start
import fedsb.privacy.randomness as randomness
from clients.private_evidence import clipped_sketch
from fedsb.adapters.starts import SIDES, Sketch
from fedsb.config.compose import load
from fedsb.config.schema import PrivacyConfig
from fedsb.core.rng import torch_generator
from fedsb.core.state import Layout, Name, State
from fedsb.models.collating import collate
from fedsb.privacy.account import Account
from fedsb.privacy.accounting import Entry
from fedsb.privacy.adaptive import sum_multiplier
from fedsb.privacy.ledger import Ledger
from fedsb.privacy.plan import Plan
from fedsb.tasks.task import Task
from strategies.privacy.client_unit import ClientPrivacy
from strategies.privacy.mean import ClippingBound

SKETCH = Sketch(rank=4, oversample=4, power_iterations=0, seed=0)
CLIENTS = 64
SHAPES = {Name("one", "R"): (8, 8), Name("two", "R"): (8, 8), Name("classifier", "head"): (4, 32)}
# The clients' updates over the bound.
EXCESS = 10.0


@dataclass
class StartRow:
    """An exchange of the private gradient start."""

    name: str
    covers: str
    subject: Subject
    entry: Entry
    stage: str
    attacked: bool = True
    checked: bool = True
    neighbours: Sequence[int] | None = None
    count_noise: float | None = None
    reaches: bool = True

    @property
    def deviation(self) -> float:
        return self.entry.noise_multiplier

    @property
    def examples(self) -> int:
        return len(self.subject.canaries)

    @property
    def sizes(self) -> Mapping[str, int]:
        return {short(f"{name.module}.{name.role}"): tensor.numel() for name, tensor in self._products[0].items()}

    @cached_property
    def pulls(self) -> Values:
        each = torch.stack([flat(products).double() for products in self._products])
        norms: Values = (each * (self._norm / each.norm(dim=1, keepdim=True)).clamp(max=1.0) / self._norm).numpy()
        return norms

    @cached_property
    def _probes(self) -> State:
        shapes = self.subject.adapted.shapes
        if SIDES[self.stage] == "right":
            return SKETCH.probes(shapes)
        stream = torch_generator(0, "probes")
        return SKETCH.basis(
            State({Name(module, "Y"): torch.randn(m, SKETCH.width(m, n), generator=stream) for module, (m, n) in shapes.items()})
        )

    @cached_property
    def _products(self) -> list[State]:
        """Each canary's products with the probes, as an adversary would compute them."""
        self.subject.adapted.install(self.subject.start, self.subject.frozen)
        batches = [collate([canary], self.subject.adapted, TASK) for canary in self.subject.canaries]
        model, side = self.subject.adapted.model, SIDES[self.stage]
        return [
            clipped_sketch(model, [b], lambda m, b: TASK.losses(TASK.forward(m, b), b), probes=self._probes, side=side, max_norm=1e6).sum
            for b in batches
        ]

    @cached_property
    def _norm(self) -> float:
        return min(float(flat(products).norm()) for products in self._products) / EXCESS

    @cached_property
    def _privacy(self) -> PrivacyConfig:
        return replace(load(["privacy=example", "privacy.epsilon=4"]).privacy, init_norm=self._norm)

    def release(self, present: Bits, run: int) -> Release:
        watch = Watch([range(self.examples)])
        self.subject.adapted.install(self.subject.start, self.subject.frozen)
        with TemporaryDirectory() as folder:
            state = self._answer(WatchedTask(watch, self.subject.canaries), zeroed(self.subject.canaries, present), run, Path(folder))
        values = flat(state).double().numpy() * self.entry.sampling_rate * self.examples / self._norm
        return Release((values,), np.isin(np.arange(self.examples), list(watch.pending))[None])

    def _answer(self, task: Task, data: list[dict[str, Any]], run: int, folder: Path) -> State:
        number = 0 if SIDES[self.stage] == "right" else 1
        account = Account(
            Ledger(folder, {"client": "audited"}), Plan(self.examples, DELTA, self.entry, (), self.entry, 2), "rdp", None, "audit"
        )
        answer = private_start.private_evidence(
            self.subject.adapted,
            task,
            data,
            sketch=SKETCH,
            stage=self.stage,
            number=number,
            probes=self._probes if number else State(),
            train=self.subject.train,
            privacy=self._privacy,
            micro_batch=12,
            account=account,
            streams=randomness.simulated_streams(0, self.name, run, f"evidence-{number}", torch.device("cpu")),
        )
        return answer.sent

    def counted(self, present: Bits, drawn: Bits | None) -> Values:
        raise AssertionError


@dataclass
class ServerRow:
    """A round, or a start's exchange, under ``privacy=client``; the canaries are clients that answer or do not.

    Attributes:
        adaptive: the bound follows a quantile.
        start: an exchange of a noised start.
    """

    name: str
    covers: str
    entry: Entry
    adaptive: bool = False
    start: bool = False
    attacked: bool = True
    checked: bool = True
    neighbours: Sequence[int] | None = None
    examples: int = CLIENTS
    reaches: bool = True

    @property
    def count_noise(self) -> float | None:
        return COUNT_NOISE if self.adaptive else None

    @property
    def deviation(self) -> float:
        sigma = self.entry.noise_multiplier
        return sum_multiplier(sigma, COUNT_NOISE) if self.adaptive else sigma

    @property
    def sizes(self) -> Mapping[str, int]:
        return {short(f"{name.module}.{name.role}"): tensor.numel() for name, tensor in self._current.items()}

    @cached_property
    def pulls(self) -> Values:
        width = sum(self.sizes.values())
        stream = torch_generator(0, "clients")
        frame: Values = torch.linalg.qr(torch.randn(width, CLIENTS, generator=stream, dtype=torch.float64))[0].T.numpy()
        return frame

    @cached_property
    def _current(self) -> State:
        stream = torch_generator(0, "state")
        return State({name: torch.randn(shape, generator=stream) for name, shape in SHAPES.items()})

    def _states(self, present: Bits) -> list[State]:
        """Return the updates of the clients that answer."""
        sizes = [tensor.numel() for tensor in self._current.values()]
        return [
            State({name: part.view(SHAPES[name]) for name, part in zip(self._current, torch.split(EXCESS * update, sizes), strict=True)})
            for update in torch.from_numpy(self.pulls)[torch.from_numpy(present)]
        ]

    def release(self, present: Bits, run: int) -> Release:
        bound, sigma = ClippingBound(1.0, 0.5, 0.2, COUNT_NOISE) if self.adaptive else ClippingBound.fixed(1.0), self.entry.noise_multiplier
        cohort = tuple(str(i) for i in range(CLIENTS))
        server = ClientPrivacy(bound, sigma, seed=0, start_noise=sigma, clients=cohort)
        if self.start:
            total = server.start_sum(Layout.of(self._current), run, real=False)
            for state in self._states(present):
                total.add(state)
            return Release((flat(total.mean()).numpy() * CLIENTS,))
        reducer = server.mean(cohort, run, real=False)
        current = self._current.map(torch.Tensor.double)
        reducer.begin(current)
        for update in self._states(present):
            reducer.add(State({name: tensor + update[name] for name, tensor in current.items()}), 1.0)
        moved = reducer.finish().state
        values = (flat(moved) - flat(current)).numpy() * CLIENTS
        return Release((values,), None, -np.log([bound.value]) / 0.2 * CLIENTS if self.adaptive else None)

    def counted(self, present: Bits, drawn: Bits | None) -> Values:
        return np.array([-0.5 * present.sum()])


def other_rows(subject: Subject) -> list[StartRow | ServerRow]:
    """Give the rows that do not train."""
    sampled, whole = entry_of(0.5, 1), entry_of(1.0, 1)
    return [
        StartRow("private start, G P", "the first exchange of init.kind=gradient with privacy.init_fraction", subject, sampled, "range"),
        StartRow("private start, Gᵀ Q", "the other exchanges", subject, sampled, "core"),
        ServerRow("privacy=client", "a round at the server, flat", whole),
        ServerRow("privacy=client, adaptive", "a round, and the noised count", whole, adaptive=True),
        ServerRow("privacy=client, start", "an exchange of a start at the server", whole, start=True),
    ]
