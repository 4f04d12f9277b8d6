"""What a client keeps for itself from round to round: on its own disk, by round, so that a run that goes back finds what was there then.

Which of the rounds a client goes on from is the server's to say: an upload that came late or was dropped counts for nobody, and a run
that was resumed may have gone back. So no state takes another's place.
"""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from fedsb.core.disk import make_folder, replace_whole
from fedsb.core.state import Name, State
from fedsb.privacy.codes import OwnStateLost

NAME = re.compile(r"round-([0-9]{4,})\.safetensors")


class OwnState:
    """The states of one client in one run.

    Args:
        folder: made when something is kept.
        keep: number of checkpoints that the server keeps: it may go back to the beginning of as many rounds.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def save(self, round_number: int, state: State, *, since: int) -> None:
        """Keep a state as that of the end of a round, whole or not at all; remove those that nobody can ask for any more.

        Args:
            round_number: of the round.
            state: what the client has trained in it.
            since: the round whose state it began from; 0: from the start. What lies between the two has not counted.
        """
        make_folder(self._folder)
        replace_whole(self._path(round_number), save({f"{n.role}|{n.module}": t.contiguous() for n, t in state.items()}))
        # The oldest checkpoint is of this round: the run would go on from the last state that had counted by then.
        oldest = max((number for number in self._rounds() if number <= min(since, round_number - self._keep)), default=0)
        for number in self._rounds():
            if number < oldest or since < number < round_number:
                self._path(number).unlink(missing_ok=True)

    def of(self, round_number: int) -> State:
        """Return the state of the end of a round.

        Raises:
            OwnStateLost: it is not there, or damaged: another one in its place would lead elsewhere.
        """
        path = self._path(round_number)
        try:
            tensors = load(path.read_bytes())
        except (OSError, SafetensorError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise OwnStateLost(f"what this client kept of its own in round {round_number}, '{path}', cannot be read: {reason}") from None
        return State({Name(*reversed(key.split("|", 1))): tensor for key, tensor in tensors.items()})

    def _rounds(self) -> list[int]:
        found = (NAME.fullmatch(path.name) for path in self._folder.iterdir()) if self._folder.is_dir() else ()
        return [int(name[1]) for name in found if name]

    def _path(self, round_number: int) -> Path:
        return self._folder / f"round-{round_number:04d}.safetensors"
