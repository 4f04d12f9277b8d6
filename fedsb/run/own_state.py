"""What a client keeps for itself from round to round: on its own disk, by round, so that a run that goes back finds what was there then."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from fedsb.core.disk import make_folder, replace_whole
from fedsb.core.errors import RunError
from fedsb.core.state import Name, State

NAME = re.compile(r"round-([0-9]{4,})\.safetensors")


class OwnState:
    """The states of one client in one run.

    Args:
        folder: made when something is kept.
        keep: number of rounds to keep; as many as a run may go back, and one.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def save(self, round_number: int, state: State) -> None:
        """Keep a state as that of the end of a round, whole or not at all; what was of later rounds is no more."""
        make_folder(self._folder)
        rounds = self._rounds()
        replace_whole(self._path(round_number), save({f"{n.role}|{n.module}": t.contiguous() for n, t in state.items()}))
        earlier = sorted(number for number in rounds if number < round_number)
        for number in {*(number for number in rounds if number > round_number), *earlier[: -self._keep]}:
            self._path(number).unlink(missing_ok=True)

    def last(self, before: int) -> State | None:
        """Return the state of the last round before another; None where there is none.

        Raises:
            RunError: it is damaged: an older one in its place would lead elsewhere.
        """
        rounds = [number for number in self._rounds() if number < before]
        if not rounds:
            return None
        path = self._path(max(rounds))
        try:
            tensors = load(path.read_bytes())
        except (OSError, SafetensorError) as error:
            raise RunError(f"what this client keeps of its own, '{path}', cannot be read: {error}") from None
        return State({Name(*reversed(key.split("|", 1))): tensor for key, tensor in tensors.items()})

    def _rounds(self) -> list[int]:
        found = (NAME.fullmatch(path.name) for path in self._folder.iterdir()) if self._folder.is_dir() else ()
        return [int(name[1]) for name in found if name]

    def _path(self, round_number: int) -> Path:
        return self._folder / f"round-{round_number:04d}.safetensors"
