"""What a client keeps for itself from round to round: on its own disk, by round, so that a run that goes back finds what was there then.

Which of the rounds a client goes on from is the server's to say: an upload that came late or was dropped counts for nobody, and a run
that was resumed may have gone back. So no state takes another's place.
"""

from __future__ import annotations

import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from fedsb.core.disk import make_folder, replace_whole
from fedsb.core.state import Name, State
from fedsb.privacy.codes import OwnStateLost
from fedsb.wire.cache_limits import DAY, mark_used

SINCE = "since"  # which round's state a state goes on from
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
        tensors = {f"{n.role}|{n.module}": t.contiguous() for n, t in state.items()}
        replace_whole(self._path(round_number), save(tensors, {SINCE: str(since)}))
        needed = self._counted(since, round_number - self._keep)
        for number in self._rounds():
            if needed is not None and number < round_number and number not in needed:
                self._path(number).unlink(missing_ok=True)

    def _counted(self, since: int, back_to: int) -> set[int] | None:
        """Return the rounds that had counted by a checkpoint that may still be gone back to, the last first; None where nobody knows."""
        found: set[int] = set()
        while since:
            found.add(since)
            if since <= back_to:
                break
            try:
                with safe_open(self._path(since), "pt") as file:
                    since = int(file.metadata()[SINCE])
            except (OSError, SafetensorError, TypeError, KeyError):
                return None
        return found

    def of(self, round_number: int) -> State:
        """Return the state of the end of a round.

        Raises:
            OwnStateLost: it is not there, or damaged: another one in its place would lead elsewhere.
        """
        path = self._path(round_number)
        mark_used(path)
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


def forget_old(folder: Path, days: float, spared: str, now: float | None = None) -> list[str]:
    """Remove what clients kept in runs that have not used it for so many days, and return the names of these runs.

    Args:
        folder: with a folder for each run.
        days: since anything of a run was kept or read.
        spared: the run that is under way.
        now: seconds since the epoch; None: the clock's.
    """
    latest = (time.time() if now is None else now) - days * DAY
    gone = []
    for run in sorted(folder.iterdir()) if folder.is_dir() else ():
        with suppress(FileNotFoundError):  # another message may remove some meanwhile
            if run.name == spared or max(path.stat().st_mtime for path in (run, *run.rglob("*"))) >= latest:
                continue
            shutil.rmtree(run, ignore_errors=True)
            gone.append(run.name)
    return gone
