"""What a run leaves on disk: one record a round, a summary at the end, and the folder that holds both."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from fedsb.core.disk import create_whole, make_folder, replace_whole
from fedsb.core.errors import UserError

# A folder with one of these belongs to a run.
MARKS = ("config.yaml", "summary.json", "ledgers")


@dataclass(frozen=True)
class RoundRecord:
    """One round as the server saw it. Bytes are of this round alone, summed over clients; the three payloads do not overlap.

    Attributes:
        round: from 1; 0 is the state before the first round, with the bytes of the start.
        clients: names of those whose reply counted.
        failed: reason by name of those whose reply did not.
        remarks: what happened to the nodes that serve the clients: two that named one, one that came back.
        metrics: on the server's test split, after this round.
        client_metrics: on each client's held-out part, by name.
        train_loss: mean over the clients' local training.
        payload_up, payload_down, payload_one_off: what the protocol moves; one-off is what is delivered once, such as B and A.
        overhead: the rest of the serialised messages.
        exactness_gap: relative distance between the held and the mean weight change, from factors.
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
    client_metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    train_loss: float | None = None
    payload_up: int = 0
    payload_down: int = 0
    payload_one_off: int = 0
    overhead: int = 0
    exactness_gap: float | None = None
    held_gap: float | None = None
    extras: Mapping[str, float] = field(default_factory=dict)
    accounts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    epsilon: Mapping[str, Any] | None = None
    epsilon_reason: str | None = None
    simulation_only: Mapping[str, float] = field(default_factory=dict)
    wall_s: float | None = 0.0
    cpu_s: float | None = 0.0

    def to_json(self) -> str:
        """Return one line of JSON; NaN and infinity, which JSON lacks, become null."""
        return json.dumps(finite(asdict(self)), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> RoundRecord:
        """Read what :meth:`to_json` wrote, ignoring keys of later versions; a null metric comes back as NaN."""
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in json.loads(line).items() if key in known}
        values |= {key: tuple(values.get(key, ())) for key in ("clients", "remarks")}
        for key in ("metrics", "extras", "simulation_only"):
            values[key] = _numbers(values.get(key, {}))
        values["client_metrics"] = {name: _numbers(row) for name, row in values.get("client_metrics", {}).items()}
        return cls(**values)


def finite(value: Any) -> Any:
    """Copy a JSON-like value with None for every NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(row: Mapping[str, float | None]) -> dict[str, float]:
    return {key: math.nan if value is None else value for key, value in row.items()}


class RunFolder:
    """The folder of a run that is about to start, or with ``resumed`` to go on; see :func:`read_run` for one that has run.

    Raises:
        UserError: the folder holds another run, or can't be made.
    """

    def __init__(self, path: str | Path, *, resumed: bool = False) -> None:
        self.path = Path(path)
        if resumed:
            return
        taken = next((mark for mark in MARKS if (self.path / mark).exists()), None)
        if taken is not None:
            raise UserError(f"output '{self.path}' already holds a run ({taken}); choose another output=…")
        try:
            make_folder(self.path, mode=0o777)
        except OSError as error:
            raise UserError(f"output '{self.path}' can't be made ({error.strerror}); choose another output=…") from error

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """The records, a line a round."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """The summary, written last: a folder without one is of a run that did not finish."""
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints; whoever writes there makes it."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """Folder of the adapter in PEFT's format; whoever writes there makes it."""
        return self.path / "adapter"

    @property
    def head(self) -> Path:
        """The trained head of a run without adapters."""
        return self.path / "head.safetensors"

    @property
    def log(self) -> Path:
        """The log."""
        return self.path / "run.log"

    def write_config(self, text: str) -> None:
        """Claim the folder for this run; one that is killed at it has claimed nothing.

        Raises:
            UserError: another run has claimed it since.
        """
        try:
            create_whole(self.config, text)
        except FileExistsError as error:
            raise UserError(f"output '{self.path}' already holds a run (config.yaml); choose another output=…") from error

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from going on with this run inside the block; the lock ends with the process, however it ends.

        Raises:
            UserError: a process does already.
        """
        with self.config.open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"the run in '{self.path}' is under way in another process; end that one first") from None
            yield

    def cut(self, last: int) -> list[RoundRecord]:
        """Drop the records of rounds after ``last``, which will be run again, and return the others."""
        kept = [record for record in _read_records(self.metrics) if record.round <= last]
        replace_whole(self.metrics, "".join(record.to_json() + "\n" for record in kept))
        return kept

    def append(self, record: RoundRecord) -> None:
        """Append a record and force it to disk, so that a killed run keeps its finished rounds."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(record.to_json() + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the summary whole or not at all."""
        replace_whole(self.summary, json.dumps(finite(summary), indent=2, allow_nan=False) + "\n")


@dataclass(frozen=True)
class Run:
    """A run read back from its folder; ``summary`` is None where the run did not finish."""

    path: Path
    config: Mapping[str, Any]
    records: tuple[RoundRecord, ...]
    summary: Mapping[str, Any] | None

    def setting(self, dotted: str) -> Any:
        """Look a value up in the configuration; None where it has no such key."""
        value: Any = self.config
        for key in dotted.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    @property
    def method(self) -> str:
        """Name of the method."""
        return str((self.summary or {}).get("method") or self.setting("method.name") or "unknown")


def read_run(folder: str | Path) -> Run:
    """Read a run's folder, finished or not.

    Raises:
        UserError: the folder holds no record of a run.
    """
    path = Path(folder)
    records = _read_records(path / "metrics.jsonl")
    if not records:
        raise UserError(f"'{path}' holds no run (metrics.jsonl is missing or empty); give the output folder of a run")
    config, summary = path / "config.yaml", path / "summary.json"
    try:
        return _read_folder(path, config, summary, records)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"'{path}' holds a config.yaml or summary.json that cannot be read ({' '.join(str(error).split())[:120]})"
        ) from None


def _read_folder(path: Path, config: Path, summary: Path, records: tuple[RoundRecord, ...]) -> Run:
    return Run(
        path=path,
        config=(yaml.safe_load(config.read_text(encoding="utf-8")) or {}) if config.is_file() else {},
        records=records,
        summary=json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else None,
    )


def _read_records(path: Path) -> tuple[RoundRecord, ...]:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    # A run killed while it wrote leaves a last line without its newline: that round did not finish.
    lines = text[: text.rfind("\n") + 1].splitlines()
    # A resumed run may repeat a round: the later line counts.
    by_round = {record.round: record for record in map(RoundRecord.from_json, lines)}
    return tuple(by_round[number] for number in sorted(by_round))
