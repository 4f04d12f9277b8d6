"""The start that everybody makes, kept on a node's disk: a message may have a process of its own, and an SVD of every W0 takes long."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from fedsb.core.disk import make_folder
from fedsb.core.errors import UserError
from fedsb.core.prints import ALIKE, distance, prints
from fedsb.core.state import Layout, State
from fedsb.run.groups import tensors_of
from fedsb.run.whole_files import Damaged, read_whole, write_whole

LOG = logging.getLogger(__name__)
GROUP = "start"


@dataclass(frozen=True)
class KeptStart:
    """One file, of the last start alone. What tells whose start it is are the prints that the server has of its own.

    Attributes:
        path: of the file.
        prints: the server's.
        seed: of the run.
    """

    path: Path
    prints: tuple[float, ...]
    seed: int

    def read(self, made: Layout) -> State | None:
        """Return every factor of a start of which those in ``made`` are the server's; None where it is not there, or of another run."""
        try:
            whole = read_whole(self.path)[0].get(GROUP, State())
        except (Damaged, UserError):
            return None
        names = dict(made.shapes)
        held = State({name: t for name, t in whole.items() if name in names})
        alike = Layout.of(held) == made and distance(prints(held, self.seed), self.prints) <= ALIKE
        return whole if alike else None

    def write(self, whole: State) -> None:
        """Keep a start in the place of the last one; a full disk costs the next process its time, and nobody else anything."""
        try:
            make_folder(self.path.parent)
            write_whole(self.path, tensors_of({GROUP: whole.map(lambda t: t.contiguous())}), {})
        except OSError as error:
            LOG.warning("the start is not kept, and will be computed again: %s", error)
