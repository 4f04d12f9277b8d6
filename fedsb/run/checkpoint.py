"""Checkpoints: what the server holds after a round, and its frozen log; safetensors, written whole or not at all.

A round's file names the head of the frozen log that it builds on, so a damaged delta is found by the hash of its content. The file itself
carries a hash over its tensors and facts, the run it belongs to, and the version of this format.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsb.core.errors import RunError, UserError
from fedsb.core.state import State
from fedsb.run.groups import tensors_of
from fedsb.run.log_files import STATE, files_in, files_of, read_log, write_log
from fedsb.run.whole_files import FORMAT, Damaged, read_whole, write_whole
from fedsb.wire.frozen import FrozenLog

START = "start"  # a fact: prints of the start that everybody made, to be made again
LABELS = "labels"  # a fact: names of the classes, in the order of the head's rows
ROUND = re.compile(r"round-[0-9]{4,}\.safetensors")
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Carried:
    """What a run needs to go on beside its state and its frozen log.

    Attributes:
        states: named groups of tensors, such as a server optimiser's moments.
        facts: plain values, JSON-like.
    """

    states: Mapping[str, State] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """What the server holds after a round; round 0 is the end of the start."""

    round: int
    state: State
    frozen: FrozenLog
    carried: Carried = field(default_factory=Carried)


def save_checkpoint(folder: Path, snapshot: Snapshot, *, run: str = "", keep: int = 1, spare: int | None = None) -> None:
    """Write ``round-NNNN.safetensors`` and the deltas that are not there whole; drop rounds before the last ``keep``.

    Args:
        folder: made if need be.
        snapshot: what to write. What its log has become is :func:`~fedsb.run.log_files.write_log`'s.
        run: fingerprint of the run's configuration, which a resumed run must share.
        keep: number of rounds to keep.
        spare: a round that is kept beside them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = write_log(folder, snapshot.frozen)
    facts = {"format": FORMAT, "round": snapshot.round, **log, "run": run, "facts": dict(snapshot.carried.facts)}
    write_whole(folder / f"round-{snapshot.round:04d}.safetensors", tensors_of({STATE: snapshot.state, **snapshot.carried.states}), facts)
    # A file of a later round is not this run's, or is damaged: it takes no other's place.
    for old in [path for path in _rounds(folder) if _number(path) <= snapshot.round][keep:]:
        if _number(old) != spare:
            old.unlink()
    if len(snapshot.frozen.deltas()) < snapshot.frozen.version:
        _drop_superseded(folder)


def _drop_superseded(folder: Path) -> None:
    """Remove the files of logs that no round which is still there builds on; none where a round cannot be read."""
    needed: set[Path] = set()
    for path in _rounds(folder):
        try:
            needed |= files_of(folder, read_whole(path)[1])
        except (Damaged, UserError):
            return
    for path in files_in(folder):
        if path not in needed:
            path.unlink()


def load_checkpoint(folder: Path, *, run: str | None = None, number: int | None = None) -> Snapshot:
    """Read the checkpoint of a round, or where no ``number`` is given the last that is whole.

    One that is damaged, or of another ``run``, is named in the log and passed over.

    Raises:
        FileNotFoundError: the folder holds none.
        RunError: it holds some, and none of them can be used.
        UserError: the last was written by a later version.
    """
    reasons = []
    for path in [path for path in _rounds(folder) if number in (None, _number(path))]:
        try:
            return _load(folder, path, run)
        except Damaged as error:
            reasons.append(f"'{path}' {error}")
            LOG.warning("checkpoint passed over: %s", reasons[-1])
    if reasons:
        raise RunError(f"no checkpoint can be used: {'; '.join(reasons)}")
    raise FileNotFoundError(f"no checkpoint in '{folder}'")


def _rounds(folder: Path) -> list[Path]:
    """Return the files of rounds, the latest first."""
    return sorted((path for path in folder.iterdir() if ROUND.fullmatch(path.name)), key=_number, reverse=True) if folder.is_dir() else []


def _number(path: Path) -> int:
    return int(path.stem.split("-")[1])


def _load(folder: Path, path: Path, run: str | None) -> Snapshot:
    groups, facts = read_whole(path)
    if run is not None and facts["run"] != run:
        raise Damaged("is of a run with another configuration")
    state = groups.pop(STATE, State())
    return Snapshot(facts["round"], state, read_log(folder, facts), Carried(groups, facts["facts"]))
