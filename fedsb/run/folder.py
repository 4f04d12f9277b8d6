"""The folder of a run: its configuration, one record a round, a summary at the end; and a run read back from it."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fedsb.core.disk import create_whole, make_folder, replace_whole
from fedsb.core.errors import UserError
from fedsb.run.records import RoundRecord, finite

# libyaml's, where it is there: a tenth of the time, which is most of what reading a run takes.
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
IDENTITY = re.compile("[0-9a-f]{32}")  # of a run
TOLD = ("metrics", "rank", "trained_params", "wall_s")  # by every summary, whichever version wrote it
PARTS = {"selected": "round", "epsilon": "max"}  # parts of a summary that may be there, and what is in each
Read = TypeVar("Read")
# A folder with one of these belongs to a run.
MARKS = ("config.yaml", "summary.json", "ledgers")


class DamagedRunError(UserError):
    """A file in a run's folder is not what a run writes."""


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

    def identity(self, fresh: str) -> str:
        """Return what nodes know the run by, over all processes that go on with it; ``fresh``, which is kept then, where nothing is yet."""
        path = self.path / "identity"
        with suppress(FileExistsError):
            create_whole(path, fresh + "\n")
        known = path.read_text(encoding="utf-8", errors="replace").strip()
        if IDENTITY.fullmatch(known):
            return known
        replace_whole(path, fresh + "\n")  # killed at it, on a file system without hard links, or damaged since: nodes would not take it
        return fresh

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
        kept = [record for record in records_in(self.metrics) if record.round <= last]
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
        DamagedRunError: a file of it is not what a run writes.
    """
    path = Path(folder)
    records = _whole(path / "metrics.jsonl", records_in)
    if not records:
        if (path / "metrics.jsonl").is_file() and (path / "metrics.jsonl").stat().st_size:
            raise DamagedRunError(f"'{path}' holds a metrics.jsonl without one whole line")
        if (path / "summary.json").is_file():
            raise DamagedRunError(f"'{path}' holds a summary.json and no metrics.jsonl")
        raise UserError(f"'{path}' holds no run (metrics.jsonl is missing or empty); give the output folder of a run")
    return Run(path, _whole(path / "config.yaml", _config_in), records, _whole(path / "summary.json", _summary_in))


def _whole(path: Path, read: Callable[[Path], Read]) -> Read:
    """Return what a file of a run holds.

    Raises:
        DamagedRunError: something else.
    """
    try:
        return read(path)
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DamagedRunError(f"'{path.parent}' holds a {path.name} that cannot be read ({reason})") from None


def _config_in(path: Path) -> Mapping[str, Any]:
    return _mapping(yaml.load(path.read_text(encoding="utf-8"), Loader) or {}) if path.is_file() else {}


def _summary_in(path: Path) -> Mapping[str, Any] | None:
    return summary_of(path.read_text(encoding="utf-8")) if path.is_file() else None


def summary_of(text: str) -> Mapping[str, Any]:
    """Return what a ``summary.json`` holds, as far as others rely on it.

    Raises:
        ValueError: it is no JSON, or lacks what every summary has; also TypeError, where it has another shape.
    """
    found = _mapping(json.loads(text))
    if lacking := [key for key in TOLD if key not in found]:
        raise ValueError(f"{lacking[0]} is missing")
    for key, inner in PARTS.items():
        if found.get(key) is not None and inner not in _mapping(found[key]):
            raise ValueError(f"{key} lacks {inner}")
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError("it is no table of keys")
    return value


def records_in(path: Path) -> tuple[RoundRecord, ...]:
    """Read ``metrics.jsonl``, one record a round; none where it is not there.

    Raises:
        ValueError: a line is not a record; also TypeError, KeyError or AttributeError, as the line has it.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    # A run killed while it wrote leaves a last line without its newline: that round did not finish.
    lines = text[: text.rfind("\n") + 1].splitlines()
    # A resumed run may repeat a round: the later line counts.
    by_round = {record.round: record for record in map(RoundRecord.from_json, lines)}
    return tuple(by_round[number] for number in sorted(by_round))
