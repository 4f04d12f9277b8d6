"""Checkpoints: the server's trained state after each round, and every frozen delta once; safetensors, written atomically."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from fedsb.errors import RunError
from fedsb.frozen import FrozenLog
from fedsb.state import Name, State


def save_checkpoint(folder: Path, round_number: int, state: State, frozen: FrozenLog) -> None:
    """Write ``round-NNNN.safetensors`` and the deltas that are not there yet; drop the previous round's file."""
    folder.mkdir(parents=True, exist_ok=True)
    for version, delta in enumerate(frozen.deltas(), start=1):
        path = folder / f"frozen-{version:04d}.safetensors"
        if not path.exists():
            _write(path, delta, {"version": str(version), "head": frozen.heads[version]})
    _write(folder / f"round-{round_number:04d}.safetensors", state, {"round": str(round_number), "frozen": frozen.head})
    for old in folder.glob("round-*.safetensors"):
        if old.name != f"round-{round_number:04d}.safetensors":
            old.unlink()


def load_checkpoint(folder: Path) -> tuple[int, State, FrozenLog]:
    """Read the last checkpoint of a run.

    Raises:
        FileNotFoundError: the folder holds none.
        RunError: a frozen delta that the round builds on is not there.
    """
    rounds = sorted(folder.glob("round-*.safetensors"))
    if not rounds:
        raise FileNotFoundError(f"no checkpoint in '{folder}'")
    with safe_open(rounds[-1], "pt") as file:
        head = file.metadata()["frozen"]
    log = FrozenLog()
    for path in sorted(folder.glob("frozen-*.safetensors")):
        # A run killed between the two files leaves a delta of the round that did not finish.
        if log.head == head:
            break
        log.append(_read(path))
    if log.head != head:
        raise RunError(f"'{rounds[-1]}' builds on frozen weights that are not beside it")
    return int(rounds[-1].stem.split("-")[1]), _read(rounds[-1]), log


def _write(path: Path, state: State, metadata: Mapping[str, str]) -> None:
    scratch = path.with_suffix(".part")
    save_file({f"{name.role}|{name.module}": t.contiguous() for name, t in state.items()}, scratch, metadata=dict(metadata))
    scratch.replace(path)


def _read(path: Path) -> State:
    with safe_open(path, "pt") as file:
        return State({Name(*reversed(key.split("|", 1))): file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
