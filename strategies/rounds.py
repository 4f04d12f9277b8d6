"""What a round in progress has collected, and the record that it becomes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedsb.core.errors import RunError
from fedsb.run.records import SERVER, SHARED, RoundRecord
from strategies.transport import Tally

ACCOUNT = ("epsilon", "delta", "sampling-rate", "noise-multiplier", "steps")


@dataclass
class RoundState:
    """A round in progress; 0 is the start.

    Attributes:
        number: server round.
        order: the cohort in dispatch order.
        stage: which exchange of the start is under way.
        clients: whose replies counted.
        failed: reason by client of those whose reply did not.
        uploads: (metrics, weight) of each upload.
        figures: of how uploads were summed that the server did not see.
        diagnostics: of server-side privacy; not private themselves.
        accounts: what private clients said of their accounts.
        remarks: what happened to the nodes that serve the clients.
        measured_by: whose metrics the round's are.
    """

    number: int
    order: tuple[str, ...] = ()
    stage: str = ""
    tally: Tally = field(default_factory=Tally)
    begun: float = field(default_factory=time.monotonic)
    cpu_begun: float = field(default_factory=time.process_time)
    clients: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    uploads: list[tuple[Mapping[str, float], float]] = field(default_factory=list)
    extras: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    diagnostics: dict[str, float] = field(default_factory=dict)
    accounts: dict[str, dict[str, float]] = field(default_factory=dict)
    gap: float | None = None
    gap_error: float | None = None
    held_gap: float | None = None
    remarks: list[str] = field(default_factory=list)
    client_metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    held_out: dict[str, int] = field(default_factory=dict)
    measured_by: str = SERVER
    _earlier: dict[str, str] = field(default_factory=dict)
    _trained: tuple[tuple[str, ...], list[str]] = field(default_factory=lambda: ((), []))

    def accept(self, client: str, metrics: Mapping[str, float]) -> None:
        """Count a valid reply of a client, and keep what it says of its account."""
        if client not in self.clients:
            self.clients.append(client)
        if "epsilon" in metrics:
            self.accounts[client] = {key: metrics[key] for key in ACCOUNT if key in metrics}

    def check_quorum(self, needed: int) -> None:
        """Stop the run where too few replies counted.

        Raises:
            RunError: fewer than ``needed``.
        """
        if len(self.clients) < needed:
            reasons = "; ".join(f"{client}: {reason}" for client, reason in sorted(self.failed.items())[:3])
            raise RunError(f"round {self.number}: {len(self.clients)} valid replies, federation.min_replies={needed} ({reasons})")

    def begin_exchange(self, order: Sequence[str], title: str) -> None:
        """Start another exchange: each client may answer anew."""
        self._earlier |= {client: f"{self.stage}: {reason}" if self.stage else reason for client, reason in self.failed.items()}
        self.order, self.clients, self.failed, self.stage = tuple(order), [], {}, title

    def begin_aside(self, asked: Sequence[str]) -> None:
        """Start an exchange beside the training, such as the evaluation on clients: who fails in it may still train, or has trained."""
        self._earlier |= self.failed
        self._trained = self.order, self.clients
        self.order, self.clients, self.failed = tuple(asked), [], {}

    def measured(self, client: str, metrics: Mapping[str, float], count: int) -> None:
        """Take in what a client has measured on ``count`` held-out examples; who holds nothing out has measured nothing."""
        self.client_metrics[client] = {key: value for key, value in metrics.items() if key not in ACCOUNT} if count else {}
        self.held_out |= {client: count} if count else {}

    def end_aside(self, title: str) -> None:
        """Go back to the round's training, with the failures of what ``title`` names beside its own."""
        self._earlier |= {client: f"{title}: {reason}" for client, reason in self.failed.items()}
        self.order, self.clients = self._trained
        self.failed = {}

    def train_loss(self) -> float | None:
        """Return the weighted mean of the clients' training losses."""
        return self._mean("loss")

    def encoding_error(self) -> float:
        """Return the weighted mean of what the clients' uploads lost on the wire, in norm of the weight change."""
        return self._mean("encoding-error") or 0.0

    def note(self, metrics: Mapping[str, float], weight: float) -> None:
        """Keep the metrics of an upload."""
        self.uploads.append((metrics, weight))

    def total_weight(self) -> float:
        """Return the sum of the uploads' weights."""
        return sum(weight for _, weight in self.uploads)

    def _mean(self, key: str) -> float | None:
        found = [(metrics[key], weight) for metrics, weight in self.uploads if key in metrics]
        total = sum(weight for _, weight in found)
        return sum(value * weight for value, weight in found) / total if total else None

    def train_metrics(self) -> dict[str, Any]:
        """Return what Flower's result keeps of the training."""
        loss = self.train_loss()
        counts = {"clients": len(self.clients), "failed": len(self.failed)}
        return counts if loss is None else {"train_loss": loss, **counts}

    def client_mean(self) -> dict[str, Any]:
        """Return the clients' own metrics, averaged by their held-out examples; those of the shared part are no metrics of the run."""
        found: dict[str, list[tuple[float, int]]] = {}
        for client, n in self.held_out.items():
            for key, value in self.client_metrics[client].items():
                if not key.startswith(SHARED):
                    found.setdefault(key, []).append((value, n))
        return {key: sum(value * n for value, n in pairs) / sum(n for _, n in pairs) for key, pairs in sorted(found.items())}

    def record(self, metrics: Mapping[str, Any]) -> RoundRecord:
        """Return the round's record with the server's metrics."""
        return RoundRecord(
            round=self.number,
            clients=tuple(self.clients),
            failed={**self._earlier, **self.failed},
            remarks=tuple(self.remarks),
            metrics={key: float(value) for key, value in metrics.items()},
            measured_by=self.measured_by,
            client_metrics=dict(self.client_metrics),
            held_out=dict(self.held_out),
            train_loss=self.train_loss(),
            payload_up=self.tally.up,
            payload_down=self.tally.down,
            payload_one_off=self.tally.one_off,
            overhead=self.tally.overhead,
            exactness_gap=self.gap,
            gap_error=self.gap_error,
            held_gap=self.held_gap,
            extras={**self.extras, **self.figures},
            accounts=dict(self.accounts),
            simulation_only=dict(self.diagnostics),
            wall_s=time.monotonic() - self.begun,
            cpu_s=time.process_time() - self.cpu_begun,
        )
