"""Checkpoints: what the server holds after a round, and every frozen delta once; safetensors, written whole or not at all.

A round's file names the head of the frozen log that it builds on, so a damaged delta is found by the hash of its content. The file itself
carries a hash over its tensors and facts, the run it belongs to, and the version of this format.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedsb.core.collector import release_memory
from fedsb.core.disk import sync_folder
from fedsb.core.errors import RunError, UserError
from fedsb.core.state import Name, State, sha256
from fedsb.core.tensor_file import mapped_tensors, write_tensors
from fedsb.run.groups import digest_of, grouped, tensors_of
from fedsb.wire.frozen import ROOT, FrozenLog, head_of

FORMAT = 2  # 1 has all deltas of the frozen log
STATE = "state"
LABELS = "labels"  # a fact: names of the classes, in the order of the head's rows
REST_BYTES = 2**28  # a delta of the log from which on it lies in its file alone, once that is written
ROUND = re.compile(r"round-[0-9]{4,}\.safetensors")
LOG = logging.getLogger(__name__)
# Deltas that this process has written or read back, by the state of their files then: a large log is not read again every round.
_WHOLE: dict[Path, tuple[int, ...]] = {}


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


class Damaged(ValueError):
    """A file of a checkpoint is not what was written."""


def save_checkpoint(folder: Path, snapshot: Snapshot, *, run: str = "", keep: int = 1) -> None:
    """Write ``round-NNNN.safetensors`` and the deltas that are not there whole; drop rounds before the last ``keep``.

    Args:
        folder: made if need be.
        snapshot: what to write. Large deltas of its log lie in their files from then on, and take no memory.
        run: fingerprint of the run's configuration, which a resumed run must share.
        keep: number of rounds to keep.
    """
    folder.mkdir(parents=True, exist_ok=True)
    frozen = snapshot.frozen
    if _write_deltas(folder, frozen):
        release_memory()
    log = {
        "frozen": frozen.heads[1:],
        "there": list(frozen.deltas()),
        "first": [[*name, version] for name, version in frozen.first.items()],
    }
    facts = {"format": FORMAT, "round": snapshot.round, **log, "run": run, "facts": dict(snapshot.carried.facts)}
    _write(folder / f"round-{snapshot.round:04d}.safetensors", tensors_of({STATE: snapshot.state, **snapshot.carried.states}), facts)
    # A file of a later round is not this run's, or is damaged: it takes no other's place.
    for old in [path for path in _rounds(folder) if _number(path) <= snapshot.round][keep:]:
        old.unlink()
    if len(frozen.deltas()) < frozen.version:
        _drop_superseded(folder)


def _write_deltas(folder: Path, frozen: FrozenLog) -> bool:
    """Write the deltas that are not there whole, and tell whether any lies in its file alone now."""
    rest = False
    for version, delta in list(frozen.deltas().items()):
        path = _delta_file(folder, version, frozen.heads[version])
        if not _holds(path, delta):
            _write(path, tensors_of({STATE: delta}), {"head": frozen.heads[version]})
            _WHOLE[path] = _stamp(path)
            if 4 * delta.numel >= REST_BYTES:
                frozen.rest(version, grouped(mapped_tensors(path))[STATE])
                rest = True
    return rest


def _drop_superseded(folder: Path) -> None:
    """Remove the deltas that no round which is still there builds on; none where a round cannot be read."""
    needed: set[Path] = set()
    for path in _rounds(folder):
        try:
            facts = _read(path)[1]
        except (Damaged, UserError):
            return
        needed |= {_delta_file(folder, version, facts["frozen"][version - 1]) for version in _there(facts)}
    for path in folder.glob("frozen-*.safetensors"):
        if path not in needed:
            path.unlink()


def load_checkpoint(folder: Path, *, run: str | None = None) -> Snapshot:
    """Read the last checkpoint that is whole; one that is damaged, or of another ``run``, is named in the log and passed over.

    Raises:
        FileNotFoundError: the folder holds none.
        RunError: it holds some, and none of them can be used.
        UserError: the last was written by a later version.
    """
    reasons = []
    for path in _rounds(folder):
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
    groups, facts = _read(path)
    if run is not None and facts["run"] != run:
        raise Damaged("is of a run with another configuration")
    state = groups.pop(STATE, State())
    return Snapshot(facts["round"], state, _log(folder, facts), Carried(groups, facts["facts"]))


def _there(facts: Mapping[str, Any]) -> Sequence[int]:
    """Return the versions of the frozen log that a checkpoint builds on."""
    versions: Sequence[int] = facts.get("there", range(1, len(facts["frozen"]) + 1))
    return versions


def _log(folder: Path, facts: Mapping[str, Any]) -> FrozenLog:
    """Read what a checkpoint's frozen log still holds."""
    heads: list[str] = facts["frozen"]
    deltas = {}
    for version in _there(facts):
        path = _delta_file(folder, version, heads[version - 1])
        _WHOLE.pop(path, None)
        stamp = _stamp(path)
        deltas[version] = _read(path)[0].get(STATE, State())
        if head_of([ROOT, *heads][version - 1], deltas[version]) != heads[version - 1]:
            raise Damaged(f"builds on '{path.name}', whose content has changed")
        _WHOLE[path] = stamp
    log = FrozenLog()
    log.take_up(heads, deltas, {Name(module, role): version for module, role, version in facts["first"]} if "first" in facts else None)
    return log


def _delta_file(folder: Path, version: int, head: str) -> Path:
    # Named by its head too: a round that is repeated after a damaged checkpoint may leave other deltas than it did before.
    return folder / f"frozen-{version:04d}-{head[:8]}.safetensors"


def _holds(path: Path, delta: State) -> bool:
    """Tell whether a delta is on the disk: its name says nothing of a file that was damaged since."""
    stamp = _stamp(path)
    if not stamp or _WHOLE.get(path) == stamp:
        return bool(stamp)
    try:
        whole = sha256(_read(path)[0].get(STATE, State())) == sha256(delta)
    except Damaged:
        return False
    if whole:
        _WHOLE[path] = stamp
    return whole


def _stamp(path: Path) -> tuple[int, ...]:
    """Return what changes when a file is written; nothing where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _write(path: Path, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
    text = json.dumps(facts)
    scratch = path.with_suffix(".part")
    write_tensors(scratch, tensors, {"facts": text, "sha256": digest_of(tensors, text)})
    with scratch.open("rb") as file:
        os.fsync(file.fileno())
    scratch.replace(path)
    sync_folder(path.parent)


def _read(path: Path) -> tuple[dict[str, State], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            text = metadata.get("facts", "")
            # First: a later format may have other tensors, and hash them otherwise.
            _check_format(path, text)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise Damaged(f"can't be read ({path.name}: {' '.join(str(error).split())[:80]})") from None
    if metadata.get("sha256") != digest_of(tensors, text):
        raise Damaged(f"is not what was written ({path.name}: its hash differs)")
    return grouped(tensors), json.loads(text)


def _check_format(path: Path, text: str) -> None:
    try:
        later = json.loads(text).get("format", FORMAT)
    except (ValueError, AttributeError):
        return  # damaged, as its hash will tell
    if isinstance(later, int) and later > FORMAT:
        raise UserError(f"'{path}' was written by a later version (format {later}, this one reads {FORMAT}); use that version")
