"""A client's cache of the frozen log on its disk: any number of processes may share one, and what is superseded does not stay.

Whatever is missing, for a disk was lost or another run has removed it, costs a message: its holder says so and is sent the whole log.
"""

from __future__ import annotations

import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedsb.core.disk import locked, reason_of
from fedsb.core.errors import RunError
from fedsb.core.state import Name, State, laid_out, sha256
from fedsb.core.tensor_file import write_tensors
from fedsb.wire.cache_limits import PAUSE_S, Limits, mark_used, prune
from fedsb.wire.frozen import ROOT, FrozenBundle, FrozenMissing, FrozenView
from fedsb.wire.superseded import Versions, superseded

LOG = logging.getLogger(__name__)
NO_LIMITS = Limits()
LATE = 2  # heads that a client may be behind the others
SPARE = 4  # superseded files that may lie there before it is worth while to remove them


class FrozenCache:
    """One safetensors file a bundle, named by its head, and the materialised view of the last head used.

    Args:
        folder: where they lie.
        rank: of the clients that it serves, where they see the log's factors at a rank of their own: it is in the names of all files, for
            under one head clients of several ranks hold different blocks.
        as_factors: whether holders add to frozen weights as factors, which are sent otherwise where they outweigh a matrix.
        limits: of what may stay on the disk.
        owner: names the run whose files alone are seen; nothing: those of any. A head says what is in a file to whom one server sends all
            of them, and nothing to a node of several servers.
    """

    def __init__(
        self, folder: Path, rank: int | None = None, *, as_factors: bool = False, limits: Limits = NO_LIMITS, owner: str = ""
    ) -> None:
        self.folder = folder
        of_rank = ("" if rank is None else f"-rank-{rank}") + ("-factors" if as_factors else "")
        self._suffix = of_rank + (f"-run-{owner}" if owner else "")
        self._limits = limits
        self._used: set[Path] = set()
        self._run = ""
        self._pruned = -math.inf
        self._told = bool(owner)
        self._head, self._view = self._empty()
        self._tidied: tuple[str, str] | None = None

    def take(self, bundle: FrozenBundle | None, head: str, run: str, *, back: int) -> FrozenView:
        """Take in what came with an instruction, if anything, and return the frozen part at its head; see :meth:`load`.

        Args:
            bundle: what the server thinks that this cache lacks.
            head: that the instruction is based on.
            run: names the run.
            back: number of rounds that the server may go back.
        """
        if run != self._run:
            self._run, self._used = run, set()  # what earlier runs have used may go
        if bundle is None:
            return self.load(head)
        self.receive(bundle)
        held = self.load(head)
        self.tidy(run, back + LATE)
        self._prune()
        return held

    def _prune(self) -> None:
        """Hold the folder to its limits, now and then; what this process has read or written of the run that is under way stays."""
        if time.monotonic() - self._pruned > PAUSE_S:
            self._pruned = time.monotonic()
            with suppress(OSError):
                prune(self.folder, self._limits, self._used)

    def receive(self, bundle: FrozenBundle) -> None:
        """Keep a bundle on disk, atomically; a known one is not written again.

        Raises:
            RunError: the disk does not take it.
        """
        if self._readable(bundle.head, bundle.parent):
            return
        try:
            self._write(bundle)
        except (OSError, SafetensorError) as error:
            reason = reason_of(error) or str(error)
            raise RunError(f"the frozen cache can't be written: {reason}; make room, or set FEDSB_HOME to another folder") from None

    def _write(self, bundle: FrozenBundle, *, replace: bool = False) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{name.role}|{name.module}": t.detach().to(torch.float32) for name, t in bundle.state.items()}
        metadata = {"parent": bundle.parent, "head": bundle.head, "sha256": sha256(bundle.state)}
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=".part")
        os.close(handle)
        scratch = Path(name)
        try:
            write_tensors(scratch, tensors, metadata)
            if replace:
                os.replace(scratch, self._path(bundle.head))
            else:
                self._keep(scratch, bundle)
        finally:
            scratch.unlink(missing_ok=True)

    def _keep(self, scratch: Path, bundle: FrozenBundle) -> None:
        """Give a file its name. The first one stays, so that processes that receive the same at the same time map one file."""
        path = self._path(bundle.head)
        try:
            os.link(scratch, path)
        except OSError:  # it is there, or the file system knows no links
            if not self._readable(bundle.head, bundle.parent):
                os.replace(scratch, path)

    def load(self, head: str) -> FrozenView:
        """Return the frozen part at ``head``. The view is shared: it changes with the next load.

        Raises:
            FrozenMissing: a bundle of the chain is absent or damaged.
        """
        try:
            chain, at = self._chain(head)
        except FrozenMissing:  # another process may have put one file in place of several meanwhile
            chain, at = self._chain(head)
        if at == ROOT and self._head != ROOT:
            self._head, self._view = self._empty()
        try:
            for bundle in reversed(chain):
                self._view.apply(bundle)
        except BaseException:
            # Half applied: the next load begins at the root again.
            self._head, self._view = self._empty()
            raise
        self._head = head
        return self._view

    def _empty(self) -> tuple[str, FrozenView]:
        return ROOT, FrozenView(by_head=not self._told)

    def _chain(self, head: str) -> tuple[list[FrozenBundle], str]:
        """Read the bundles that lead to a head, the last first, and say where they begin: at what is in memory, or at the root."""
        chain: list[FrozenBundle] = []
        at = head
        while at not in (ROOT, self._head):
            if any(bundle.head == at for bundle in chain):
                raise FrozenMissing(at)  # a circle of parents leads nowhere
            chain.append(self._read(at))
            at = chain[-1].parent
        return chain, at

    def tidy(self, run: str, keep: int) -> None:
        """Remove what later versions of a run's log have superseded; a disk that does not let it costs nothing but its room.

        Args:
            run: names it. The heads that were used in it are noted beside the files.
            keep: number of the last heads that must lead to where they did, with all that led there: as many as a run may go back.
        """
        used, notes = (run, self._head), self.folder / f"{run}{self._suffix}.heads"
        if not run or self._head == ROOT or used == self._tidied:
            return
        try:
            parent, versions = self._about(self._head) or (ROOT, {})
            # Where nothing has followed on what came first there is nothing to note.
            if notes.exists() or max(versions.values(), default=0) > 1:
                with locked(notes) as file:
                    self._tidy(file, parent, keep)
        except (OSError, SafetensorError, FrozenMissing) as error:
            LOG.debug("the frozen cache is left as it is: %s", error)
        self._tidied = used

    def _tidy(self, file: BinaryIO, parent: str, keep: int) -> None:
        file.seek(0)
        noted = [head for head in file.read().decode("ascii", "replace").split() if re.fullmatch(r"[0-9a-f]{32}", head)]
        heads = list(dict.fromkeys([*noted, *([parent] if parent != ROOT else []), self._head]))
        found = {head: about for head in heads if (about := self._about(head)) is not None}
        old = superseded({head: versions for head, (_, versions) in found.items()}, keep)
        if len(old) < SPARE:
            file.write("".join(f"{head}\n" for head in heads if head not in noted).encode())
            return
        for head, (before, _) in found.items():
            if head not in old and before in old:
                self._bridge(head, old)
        for head in old:
            self._path(head).unlink(missing_ok=True)
        file.truncate(0)
        file.write("".join(f"{head}\n" for head in found if head not in old).encode())

    def _bridge(self, head: str, old: Collection[str]) -> None:
        """Put a file in place of that of a head which holds all that those before it, which are to be removed, have led to."""
        chain = [self._read(head)]
        while chain[-1].parent in old:
            chain.append(self._read(chain[-1].parent))
        tensors: dict[Name, Tensor] = {}
        for bundle in reversed(chain):
            later = {_plain(name) for name in bundle.state}
            tensors = {name: t for name, t in tensors.items() if _plain(name) not in later} | dict(bundle.state)
        self._write(FrozenBundle(chain[-1].parent, head, State(tensors)), replace=True)

    def _about(self, head: str) -> tuple[str, Versions] | None:
        """Return the parent of a file and the versions of what it holds, from its header; None where there is none that can be read."""
        try:
            with safe_open(self._path(head), "pt") as file:
                names = [Name(*reversed(key.split("|", 1))) for key in file.keys()]  # noqa: SIM118
                return str((file.metadata() or {}).get("parent", "")), {_plain(name): int(name.role.split("@")[1]) for name in names}
        except (OSError, SafetensorError, TypeError, ValueError, IndexError):
            return None

    def _path(self, head: str) -> Path:
        # It comes from the server, and must not lead out of the folder.
        if not re.fullmatch(r"[0-9a-f]+", head):
            raise ValueError(f"'{head}' is no head of a frozen log")
        return self.folder / f"{head}{self._suffix}.safetensors"

    def _readable(self, head: str, parent: str) -> bool:
        try:
            return self._read(head).parent in (parent, ROOT)  # what leads there from nothing does so from anywhere
        except FrozenMissing:
            return False

    def _read(self, head: str) -> FrozenBundle:
        path = self._path(head)
        self._used.add(path)
        mark_used(path)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                state = State({Name(*reversed(key.split("|", 1))): laid_out(file.get_tensor(key)) for key in file.keys()})  # noqa: SIM118
            whole = (metadata["head"], metadata["sha256"]) == (head, sha256(state))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise FrozenMissing(head) from error
        if not whole or "parent" not in metadata:
            raise FrozenMissing(head)
        return FrozenBundle(metadata["parent"], head, state)


def _plain(name: Name) -> Name:
    """Return a name in a bundle without its version."""
    return Name(name.module, name.role.split("@")[0])
