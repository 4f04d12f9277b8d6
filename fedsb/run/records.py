"""What is recorded of a round."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fedsb.run.schema_files import KEY, METRICS

SERVER, CLIENTS = "server", "clients"
COUNTS = ("round", "payload_up", "payload_down", "payload_one_off", "overhead")
SHARED = "shared_"  # begins the names of a client's metrics of what is shared alone, its own part as the start has it


@dataclass(frozen=True)
class RoundRecord:
    """One round as the server saw it. Bytes are of this round alone, summed over clients; the three payloads do not overlap.

    Attributes:
        round: from 1; 0 is the state before the first round, with the bytes of the start.
        clients: names of those whose reply counted.
        failed: reason by name of those whose reply did not.
        remarks: what happened to the nodes that serve the clients: two that named one, one that came back.
        metrics: on the server's test split, after this round; or the clients' mean, weighted by their examples.
        validation: the same on the server's validation part, in a run that chooses a round by it.
        measured_by: ``server``, or ``clients`` where each keeps a part of the model.
        client_metrics: on each client's held-out part, by name; none of a client that holds nothing out. Where clients keep a part of the
            model, names that begin with ``shared_`` are, after the last round, of the model without it.
        held_out: examples that each client's metrics were measured on, by name.
        train_loss: mean over the clients' local training.
        payload_up, payload_down, payload_one_off: what the protocol moves; one-off is what is delivered once, such as B and A.
        overhead: the rest of the serialised messages.
        exactness_gap: relative distance between the held and the mean weight change, from factors.
        gap_error: its relative standard error where it is an estimate by random probes; None where it is exact.
        held_gap: the same of the weights that clients compute with, rounded as they are.
        extras: what only some methods have, such as ``residual_rank``.
        accounts: what private clients said in this round, by name; it goes into ``epsilon``.
        epsilon: of the run so far, as in the summary, the list over clients included; None without privacy, or where none can be claimed.
        epsilon_reason: why there is no epsilon, in a run with privacy.
        simulation_only: what no reader of a real private run may see: clip rate, signal-to-noise, training loss.
        wall_s, cpu_s: seconds the round took; None in a private run on real nodes, where a reply's time may tell of the data.
    """

    round: int
    clients: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    validation: Mapping[str, float] = field(default_factory=dict)
    measured_by: str = SERVER
    client_metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    held_out: Mapping[str, int] = field(default_factory=dict)
    train_loss: float | None = None
    payload_up: int = 0
    payload_down: int = 0
    payload_one_off: int = 0
    overhead: int = 0
    exactness_gap: float | None = None
    gap_error: float | None = None
    held_gap: float | None = None
    extras: Mapping[str, float] = field(default_factory=dict)
    accounts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    epsilon: Mapping[str, Any] | None = None
    epsilon_reason: str | None = None
    simulation_only: Mapping[str, float] = field(default_factory=dict)
    wall_s: float | None = 0.0
    cpu_s: float | None = 0.0

    def to_json(self) -> str:
        """Return one line of JSON, by the schema that it names; NaN and infinity, which JSON lacks, become null."""
        return json.dumps({KEY: METRICS, **finite(asdict(self))}, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> RoundRecord:
        """Read what :meth:`to_json` wrote, ignoring keys of later versions; a null metric comes back as NaN.

        Raises:
            ValueError: the line is no record; also TypeError, KeyError or AttributeError, as the line has it.
        """
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in json.loads(line).items() if key in known}
        values |= {key: tuple(values.get(key, ())) for key in ("clients", "remarks")}
        for key in ("metrics", "validation", "extras", "simulation_only"):
            values[key] = _numbers(values.get(key, {}))
        values["client_metrics"] = {name: _numbers(row) for name, row in values.get("client_metrics", {}).items()}
        if wrong := [key for key in COUNTS if not isinstance(values.get(key, 0), int)]:
            raise TypeError(f"{wrong[0]} is no whole number")
        return cls(**values)


def finite(value: Any) -> Any:
    """Copy a JSON-like value with None for every NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(row: Mapping[str, float | None]) -> dict[str, float]:
    if wrong := [key for key, value in row.items() if not isinstance(value, int | float | None)]:
        raise TypeError(f"{wrong[0]} is no number")
    return {key: math.nan if value is None else value for key, value in row.items()}
