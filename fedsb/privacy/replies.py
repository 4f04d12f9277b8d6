"""The last finished replies beside a ledger, a file each; who calls holds the ledger's lock."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedsb.core.disk import replace_whole
from fedsb.core.state import Name, State, sha256
from fedsb.privacy.charges import Key

# What stays: of the last few runs, the replies of the last few rounds, all exchanges of a start among them. A run that goes on asks again
# for what came behind its last whole checkpoint.
KEPT_RUNS, KEPT_ROUNDS = 3, 4
MOST_ROUNDS = 16  # whatever a server says of its checkpoints


class Reply(NamedTuple):
    """Which reply: its charge, and a digest of all else that it follows from; None is any."""

    key: Key
    request: str | None

    @property
    def digest(self) -> str:
        """A name for the key that any file system takes: what a run is called is the sender's choice."""
        return hashlib.sha256(json.dumps(self.key.written).encode()).hexdigest()[:32]

    @property
    def file(self) -> str:
        """How the names of its files end."""
        return f"{hashlib.sha256(self.key.run.encode()).hexdigest()[:12]}-{self.key.round}-{self.digest}.safetensors"


def keep(folder: Path, reply: Reply, state: State, metrics: Mapping[str, float], rounds: int) -> None:
    """Keep a reply, atomically, in place of an earlier one to the same key.

    Those of the last so many rounds of the last :data:`KEPT_RUNS` runs stay. An older one has to be recomputed, as a new charge.
    """
    # What another writer left half written; the lock says that none is at work.
    for leftover in folder.glob("reply-*.part"):
        leftover.unlink()
    earlier, same = _replies(folder), _replies(folder, reply)
    number = 1 + max((int(path.name.split("-")[1]) for path in earlier), default=0)
    written = folder / f"reply-{number:010d}-{reply.file}"
    replace_whole(written, _encode(reply, state, metrics))
    others = [path for path in earlier if path not in same]
    staying = _staying([*others, written], rounds)
    for path in earlier:
        if path not in staying:
            path.unlink()


def kept(folder: Path, reply: Reply) -> tuple[State, dict[str, float]] | None:
    """Return a reply with its metrics, bit for bit; None where it is not here, or damaged."""
    found = (_decode(path, reply) for path in reversed(_replies(folder, reply)))
    return next((each for each in found if each is not None), None)


def _replies(folder: Path, reply: Reply | None = None) -> list[Path]:
    """The replies on the disk, oldest first; of one key, or of all."""
    return sorted(folder.glob(f"reply-*-{reply.digest if reply else '*'}.safetensors"))


def _staying(replies: Sequence[Path], rounds: int) -> set[Path]:
    """Return those of the last so many rounds of the last runs; names of earlier versions have no run, and are of one together."""
    by_run: dict[str, dict[str, list[Path]]] = {}
    for path in reversed(replies):
        run, number = path.name.split("-")[2:4] if path.name.count("-") > 2 else ("", path.name)
        by_run.setdefault(run, {}).setdefault(number, []).append(path)
    return {path for of_rounds in [*by_run.values()][:KEPT_RUNS] for each in [*of_rounds.values()][:rounds] for path in each}


def _encode(reply: Reply, state: State, metrics: Mapping[str, float]) -> bytes:
    # Copied, as safetensors refuses tensors that share memory.
    tensors = {f"{name.role}|{name.module}": t.detach().cpu().contiguous().clone() for name, t in state.items()}
    said = {"key": json.dumps(reply.key.written), "metrics": json.dumps(dict(metrics)), "sha256": sha256(state)}
    return save(tensors, {**said, "request": reply.request or ""})


def _decode(path: Path, reply: Reply) -> tuple[State, dict[str, float]] | None:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = State({Name(*reversed(name.split("|", 1))): file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        if (metadata["key"], metadata["sha256"]) != (json.dumps(reply.key.written), sha256(state)):
            return None
        if reply.request not in (None, metadata.get("request", "")):
            return None
        return state, json.loads(metadata["metrics"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
