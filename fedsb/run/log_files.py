"""The frozen log on disk: each delta once, and in place of those that nobody is sent any more their sum, as files of some modules each.

Sums are written before the round that builds on them, and deltas go after the last round that builds on them: at whatever moment a process
ends, each round that is there finds all of its own. Each delta is added once, and a sum is written again only once deltas have come that
outweigh it: folding costs about what writing the deltas does, and the products that whoever asks for a matrix would have had to take.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsb.core.collector import release_memory
from fedsb.core.state import Name, State, laid_out, sha256
from fedsb.core.tensor_file import mapped_tensors
from fedsb.run.groups import grouped, tensors_of
from fedsb.run.whole_files import Damaged, read_whole, write_whole
from fedsb.wire.folded import Folded
from fedsb.wire.frozen import ROOT, FrozenLog, head_of

STATE = "state"
REST_BYTES = 2**28  # a delta of the log from which on it lies in its file alone, once that is written; and of sums in a file, at least
# Deltas that this process has written or read back, by the state of their files then: a large log is not read again every round.
_WHOLE: dict[Path, tuple[int, ...]] = {}


def write_log(folder: Path, frozen: FrozenLog) -> dict[str, Any]:
    """Write what of a log is not there whole, and return the facts by which a round builds on it.

    What nobody is sent any more is folded before, and large deltas lie in their files from then on, and take no memory.
    """
    due = any(version > frozen.folded.version for version in frozen.outweighed())
    if due:
        _fold(folder, frozen)
    if _write_deltas(folder, frozen) or due:
        release_memory()
    facts: dict[str, Any] = {
        "frozen": frozen.heads[1:],
        "there": list(frozen.deltas()),
        "first": [[*name, version] for name, version in frozen.first.items()],
    }
    return facts | ({"folded": _about(frozen.folded)} if frozen.folded.version else {})


def read_log(folder: Path, facts: Mapping[str, Any]) -> FrozenLog:
    """Read what a checkpoint's frozen log still holds.

    Raises:
        Damaged: some of it is not there, or not what was written.
        UserError: see :func:`~fedsb.run.whole_files.read_whole`.
    """
    heads: list[str] = facts["frozen"]
    deltas = {}
    for version in _there(facts):
        path = _delta_file(folder, version, heads[version - 1])
        deltas[version] = _noted(path)[0].get(STATE, State()).map(laid_out)
        if head_of([ROOT, *heads][version - 1], deltas[version]) != heads[version - 1]:
            raise Damaged(f"builds on '{path.name}', whose content has changed")
    log = FrozenLog()
    first = {Name(module, role): version for module, role, version in facts["first"]} if "first" in facts else None
    log.take_up(heads, deltas, first, _folded(folder, facts))
    return log


def _folded(folder: Path, facts: Mapping[str, Any]) -> Folded | None:
    if "folded" not in facts:
        return None
    about, sums = facts["folded"], State()
    for path in _sum_files(folder, facts):
        groups, of = read_whole(path)
        if of["head"] == facts["frozen"][about["version"] - 1]:
            sums = sums.merge(groups[STATE].map(laid_out))
    if [list(name) for name in sums] != about["names"]:
        raise Damaged(f"builds on the sums 'folded-{about['version']:04d}-*', which are not all there")
    return Folded(about["version"], sums, about["first"], about["last"])


def files_of(folder: Path, facts: Mapping[str, Any]) -> set[Path]:
    """Return the files that a checkpoint's frozen log lies in."""
    deltas = {_delta_file(folder, version, facts["frozen"][version - 1]) for version in _there(facts)}
    return deltas | set(_sum_files(folder, facts))


def files_in(folder: Path) -> Iterator[Path]:
    """Yield the files of frozen logs in a folder."""
    for pattern in ("frozen-*.safetensors", "folded-*.safetensors"):
        yield from folder.glob(pattern)


def _fold(folder: Path, frozen: FrozenLog) -> None:
    """Write the sums of what was added up to the head, a few modules at a time, and have the log stand on the files."""
    sums, version = State(), frozen.version
    for number, part in enumerate(_gathered(frozen.sums())):
        path = folder / f"{_sums_name(version, frozen.head)}-{number:03d}.safetensors"
        write_whole(path, tensors_of({STATE: part}), {"head": frozen.head})
        sums = sums.merge(grouped(mapped_tensors(path))[STATE])
    frozen.fold(sums)


def _gathered(states: Iterator[State]) -> Iterator[State]:
    """Put states together until they are large enough for a file."""
    held = State()
    for state in states:
        held = held.merge(state)
        if 4 * held.numel >= REST_BYTES:
            yield held
            held = State()
    if len(held):
        yield held


def _about(folded: Folded) -> dict[str, Any]:
    return {"version": folded.version, "names": [list(name) for name in folded.sums], "first": folded.first, "last": folded.last}


def _sums_name(version: int, head: str) -> str:
    return f"folded-{version:04d}-{head[:8]}"


def _sum_files(folder: Path, facts: Mapping[str, Any]) -> list[Path]:
    """Return the files of the sums that a checkpoint builds on."""
    if "folded" not in facts:
        return []
    version = facts["folded"]["version"]
    return sorted(folder.glob(f"{_sums_name(version, facts['frozen'][version - 1])}-*.safetensors"))


def _noted(path: Path) -> tuple[dict[str, State], dict[str, Any]]:
    """Read a file, and note that it is whole as it stands."""
    _WHOLE.pop(path, None)
    stamp = _stamp(path)
    found = read_whole(path)
    _WHOLE[path] = stamp
    return found


def _write_deltas(folder: Path, frozen: FrozenLog) -> bool:
    """Write the deltas that are not there whole, and tell whether any lies in its file alone now."""
    rest = False
    for version, delta in list(frozen.deltas().items()):
        path = _delta_file(folder, version, frozen.heads[version])
        if not _holds(path, delta):
            write_whole(path, tensors_of({STATE: delta}), {"head": frozen.heads[version]})
            _WHOLE[path] = _stamp(path)
            if 4 * delta.numel >= REST_BYTES:
                frozen.rest(version, grouped(mapped_tensors(path))[STATE])
                rest = True
    return rest


def _there(facts: Mapping[str, Any]) -> Sequence[int]:
    """Return the versions of the frozen log that a checkpoint builds on."""
    versions: Sequence[int] = facts.get("there", range(1, len(facts["frozen"]) + 1))
    return versions


def _delta_file(folder: Path, version: int, head: str) -> Path:
    # Named by its head too: a round that is repeated after a damaged checkpoint may leave other deltas than it did before.
    return folder / f"frozen-{version:04d}-{head[:8]}.safetensors"


def _holds(path: Path, delta: State) -> bool:
    """Tell whether a delta is on the disk: its name says nothing of a file that was damaged since."""
    stamp = _stamp(path)
    if not stamp or _WHOLE.get(path) == stamp:
        return bool(stamp)
    try:
        whole = sha256(read_whole(path)[0].get(STATE, State())) == sha256(delta)
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
