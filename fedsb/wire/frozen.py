"""What clients hold fixed: an append-only log of deltas, named by the hash of its content, and the cache that follows it.

A delta either sets the frozen factors of the adapters (roles ``A``, ``B``: Fed-SB's basis) or adds ``U V`` to the frozen weights
(roles ``U`` (m, ρ) and ``V`` (ρ, n): FedEx's residual). Version v is the state after v deltas; its *head* is a hash over the whole
chain up to it. A client at version u gets a :class:`Bundle` with exactly what it lacks. Where the ranks to send exceed
mn/(m+n), sending ``Σ U V`` is cheaper, and the bundle holds that dense sum (role ``D``) for the module instead.

The residual is accumulated as ``D ← D + U V`` in float32 from zero and in version order by server and client alike, and the
weight is always the pristine ``W0 + D``: whatever bundles a client received, it ends with the same bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedsb.core.disk import reason_of
from fedsb.core.errors import RunError
from fedsb.core.state import LINE, Layout, Name, State, laid_out, non_finite, sha256

ROOT = "0" * 32
BASIS = ("A", "B")


class FrozenMissing(LookupError):
    """The chain up to a head is not complete in this cache: the holder must ask for it."""


@dataclass(frozen=True)
class Bundle:
    """The deltas from one head to another. Roles carry the version behind an ``@``: ``U@3``, ``D@5``, ``A@1``."""

    parent: str
    head: str
    state: State

    @property
    def one_off(self) -> State:
        """The part that is delivered once in a run: the basis."""
        return State({name: t for name, t in self.state.items() if name.role.split("@")[0] in BASIS})

    @property
    def recurring(self) -> State:
        """The part that a method sends anew each round: residuals."""
        return State({name: t for name, t in self.state.items() if name.role.split("@")[0] not in BASIS})


@dataclass
class Frozen:
    """The frozen part in the form that a model takes: basis factors and the accumulated residual of each module."""

    basis: State = field(default_factory=State)
    residuals: dict[str, Tensor] = field(default_factory=dict)

    def apply(self, bundle: Bundle) -> None:
        """Bring this view from ``bundle.parent`` to ``bundle.head``, in version order."""
        versioned = sorted(bundle.state.items(), key=lambda item: (int(item[0].role.split("@")[1]), item[0]))
        for (module, role), tensor in versioned:
            kind, version = role.split("@")
            if kind in BASIS:
                self.basis = self.basis.merge(State({Name(module, kind): tensor}))
            elif kind == "D":
                self.residuals[module] = tensor.clone()
            elif kind == "U":
                self._add(module, tensor, bundle.state[Name(module, f"V@{version}")])

    def _add(self, module: str, left: Tensor, right: Tensor) -> None:
        if module not in self.residuals:
            self.residuals[module] = torch.zeros(left.shape[0], right.shape[1])
        self.residuals[module].addmm_(left, right)


class FrozenLog:
    """The server's log. ``heads[v]`` names version v; version 0 is empty."""

    def __init__(self) -> None:
        self.heads = [ROOT]
        self._deltas: list[State] = []
        self._view = Frozen()

    @property
    def version(self) -> int:
        """Number of deltas."""
        return len(self._deltas)

    @property
    def head(self) -> str:
        """Hash of the whole log."""
        return self.heads[-1]

    def append(self, delta: State) -> None:
        """Add a delta with roles ``A``/``B`` or ``U``/``V`` and move the head; an empty delta changes nothing.

        Raises:
            RunError: it holds NaN or infinity, which no client could ever get rid of (finite uploads may overflow in a difference).
        """
        if not len(delta):
            return
        if broken := non_finite(delta):
            raise RunError(f"what the frozen weight of '{broken.module}' is to gain holds NaN or infinity; lower train.lr")
        names = json.dumps(Layout.of(delta).shapes)
        self._deltas.append(delta)
        self.heads.append(hashlib.sha256((self.head + names + sha256(delta)).encode()).hexdigest()[:32])
        self._view.apply(Bundle(self.heads[-2], self.head, _versioned(delta, self.version)))

    def view(self) -> Frozen:
        """Return the frozen part at the head; it changes with the next append."""
        return self._view

    def deltas(self) -> tuple[State, ...]:
        """Return all deltas in order, for hashing and checkpoints."""
        return tuple(self._deltas)

    def bundle(self, since: int) -> Bundle | None:
        """Return what a holder of version ``since`` lacks, or None where it lacks nothing."""
        if since == self.version:
            return None
        dense = self._cheaper_dense(since)
        tensors: dict[Name, Tensor] = {Name(module, f"D@{self.version}"): self._view.residuals[module].clone() for module in dense}
        for version in range(since + 1, self.version + 1):
            part = _versioned(self._deltas[version - 1], version)
            tensors.update({n: t for n, t in part.items() if n.module not in dense or n.role.split("@")[0] in BASIS})
        return Bundle(self.heads[since], self.head, State(tensors))

    def _cheaper_dense(self, since: int) -> set[str]:
        """Modules whose ranks to send since a version exceed mn / (m + n)."""
        ranks: dict[str, int] = {}
        for delta in self._deltas[since:]:
            for name, left in delta.pick("U").items():
                ranks[name.module] = ranks.get(name.module, 0) + left.shape[1]
        return {module for module, rank in ranks.items() if dense_is_cheaper(rank, *self._view.residuals[module].shape)}


def dense_is_cheaper(rank: int, m: int, n: int) -> bool:
    """Tell whether ``rank`` columns and rows of factors outweigh the dense (m, n) matrix."""
    return rank * (m + n) > m * n


def _versioned(delta: State, version: int) -> State:
    return State({Name(name.module, f"{name.role}@{version}"): t for name, t in delta.items()})


class FrozenStore:
    """A client's cache: one safetensors file a bundle, named by its head, and the materialised view of the last head used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._head = ROOT
        self._view = Frozen()

    def receive(self, bundle: Bundle) -> None:
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

    def _write(self, bundle: Bundle) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{name.role}|{name.module}": t.detach().to(torch.float32).contiguous() for name, t in bundle.state.items()}
        metadata = {"parent": bundle.parent, "head": bundle.head, "sha256": sha256(bundle.state), "padding": ""}
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=".part")
        os.close(handle)
        scratch = Path(name)
        try:
            save_file(tensors, scratch, metadata=metadata)
            if beyond := _data_offset(scratch) % LINE:
                save_file(tensors, scratch, metadata={**metadata, "padding": " " * (LINE - beyond)})
            self._keep(scratch, bundle)
        finally:
            scratch.unlink(missing_ok=True)

    def _keep(self, scratch: Path, bundle: Bundle) -> None:
        """Give a file its name. The first one stays, so that processes that receive the same at the same time map one file."""
        path = self._path(bundle.head)
        try:
            os.link(scratch, path)
        except OSError:  # it is there, or the file system knows no links
            if not self._readable(bundle.head, bundle.parent):
                os.replace(scratch, path)

    def load(self, head: str) -> Frozen:
        """Return the frozen part at ``head``. The view is shared: it changes with the next load.

        Raises:
            FrozenMissing: a bundle of the chain is absent or damaged.
        """
        chain: list[Bundle] = []
        at = head
        while at not in (ROOT, self._head):
            if any(bundle.head == at for bundle in chain):
                raise FrozenMissing(at)  # a circle of parents leads nowhere
            chain.append(self._read(at))
            at = chain[-1].parent
        if at == ROOT and self._head != ROOT:
            self._head, self._view = ROOT, Frozen()
        try:
            for bundle in reversed(chain):
                self._view.apply(bundle)
        except BaseException:
            # Half applied: the next load begins at the root again.
            self._head, self._view = ROOT, Frozen()
            raise
        self._head = head
        return self._view

    def _path(self, head: str) -> Path:
        # It comes from the server, and must not lead out of the folder.
        if not re.fullmatch(r"[0-9a-f]+", head):
            raise ValueError(f"'{head}' is no head of a frozen log")
        return self.folder / f"{head}.safetensors"

    def _readable(self, head: str, parent: str) -> bool:
        try:
            return self._read(head).parent == parent
        except FrozenMissing:
            return False

    def _read(self, head: str) -> Bundle:
        path = self._path(head)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                state = State({Name(*reversed(key.split("|", 1))): laid_out(file.get_tensor(key)) for key in file.keys()})  # noqa: SIM118
            whole = (metadata["head"], metadata["sha256"]) == (head, sha256(state))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise FrozenMissing(head) from error
        if not whole or "parent" not in metadata:
            raise FrozenMissing(head)
        return Bundle(metadata["parent"], head, state)


def _data_offset(path: Path) -> int:
    """Return where the tensors of a safetensors file begin."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")
