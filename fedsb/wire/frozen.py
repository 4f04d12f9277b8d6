"""What clients hold beside the state of a round: an append-only log of deltas, named by the hash of its content.

A delta sets factors of the adapters (Fed-SB's B and A, once; what learns in turns, again and again) or adds ``U V`` to the frozen weights
(roles ``U`` (m, ρ) and ``V`` (ρ, n): FedEx's residual). Version v is the state after v deltas; its *head* is a hash over the whole
chain up to it. A client at version u gets a :class:`FrozenBundle` with exactly what it lacks: of each factor the latest version alone.
Where the ranks to send exceed mn/(m+n), sending ``Σ U V`` is cheaper, and the bundle holds that dense sum (role ``D``) for the module
instead; or, where holders have recompressed it, that one pair (roles ``P`` and ``Q``). What is superseded is forgotten, and what is never
sent as such again may be folded (:mod:`fedsb.wire.folded`): only its place in the chain of hashes stays.

There is one log, of the server's rank. A client of a smaller one is sent, and holds under the same heads, its block of each factor.

What is added is a :class:`~fedsb.adapters.residual.Residual`, the same function of the deltas in version order for server and client alike:
whatever bundles a client received, it ends with the same bits. The server computes nothing of it before somebody asks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedsb.adapters.low_rank import joined
from fedsb.adapters.residual import dense_is_cheaper
from fedsb.core.blocks import WHOLE, Sight
from fedsb.core.errors import RunError
from fedsb.core.state import Layout, Name, State, non_finite, sha256
from fedsb.wire.folded import Folded, outweighed
from fedsb.wire.frozen_view import ADDED, ROOT, FrozenBundle, FrozenMissing, FrozenView

__all__ = ["ADDED", "ROOT", "FrozenBundle", "FrozenLog", "FrozenMissing", "FrozenView"]

Frozen = FrozenView  # its name before; see fedsb.core.moved


class FrozenLog:
    """The server's log. ``heads[v]`` names version v; version 0 is empty.

    Attributes:
        as_factors: the modules to which holders add as factors, and which are sent as they hold them.
        folded: what stands in place of deltas that are not there any more.
    """

    def __init__(self) -> None:
        self.heads = [ROOT]
        self.as_factors: Collection[str] = ()
        self.folded = Folded()
        self._deltas: dict[int, State] = {}  # by version, in order; what is superseded is not there
        self._first: dict[Name, int] = {}  # version of the first value of a factor
        self._latest: dict[Name, int] = {}
        self._view = FrozenView()

    @property
    def version(self) -> int:
        """Number of deltas there have been."""
        return len(self.heads) - 1

    @property
    def head(self) -> str:
        """Hash of the whole log."""
        return self.heads[-1]

    def append(self, delta: State) -> None:
        """Add a delta of factors, or of ``U`` and ``V``, and move the head; an empty delta changes nothing.

        Raises:
            RunError: it holds NaN or infinity, which no client could ever get rid of (finite uploads may overflow in a difference).
        """
        if not len(delta):
            return
        if broken := non_finite(delta):
            raise RunError(f"what the frozen weight of '{broken.module}' is to gain holds NaN or infinity; lower train.lr")
        self.extend(delta, head_of(self.head, delta))

    def bring(self, made: State) -> None:
        """Let the view hold factors that everybody makes: they are in no version, and in no bundle."""
        self._view.basis = self._view.basis.merge(made)

    def take_up(
        self, heads: Sequence[str], deltas: Mapping[int, State], first: Mapping[Name, int] | None, folded: Folded | None = None
    ) -> None:
        """Bring an empty log to where another one was.

        Args:
            heads: of its versions, from 1.
            deltas: its :meth:`deltas`.
            first: its :attr:`first`; None: that of these deltas.
            folded: its :attr:`folded`; None: nothing.
        """
        if folded is not None:
            self._stand_on(folded, heads[folded.version - 1])
        for version, head in enumerate(heads, start=1):
            self._take(deltas.get(version, State()), head)
        if first is not None:
            self._first = dict(first)

    def extend(self, delta: State, head: str) -> None:
        """Add a delta that nothing is known against, under a head that somebody else has made; an empty one changes nothing."""
        if len(delta):
            self._take(delta, head)

    def _take(self, delta: State, head: str) -> None:
        delta = delta.map(Tensor.contiguous)  # as a file would hold it: what is computed with it should not tell a resumed run
        self.heads.append(head)
        self._deltas[self.version] = delta
        for name in delta:
            if name.role not in ADDED:
                self._first.setdefault(name, self.version)
                self._latest[name] = self.version
        new = delta if self.version > self.folded.version else State({name: t for name, t in delta.items() if name.role not in ADDED})
        self._view.apply(FrozenBundle(self.heads[-2], self.head, _versioned(new, self.version)))
        self._forget()

    def _forget(self) -> None:
        """Drop the deltas of which nothing counts: superseded factors, and what was added, is folded, and is never sent as such again."""
        gone = {version for version in self.outweighed() if version <= self.folded.version} if self.folded.version else set()
        for version in [v for v, old in self._deltas.items() if not self._counts(old, v, gone)]:
            self.folded.note(version, self._deltas.pop(version))

    def _counts(self, delta: State, version: int, gone: Collection[int]) -> bool:
        return any(version not in gone if name.role in ADDED else self._latest[name] == version for name in delta)

    def outweighed(self) -> set[int]:
        """Return the versions, of those that are there, whose ``U`` and ``V`` are never sent as such again; once so, always so."""
        return outweighed(self._deltas, {name: residual.shape for name, residual in self._view.residuals.items()}, self.folded)

    def sums(self) -> Iterator[State]:
        """Yield all that was added to a module in the form in which it is held, with versions, one module after the other."""
        for module, residual in self._view.residuals.items():
            apart = residual.apart(as_factors=module in self.as_factors)
            pairs = {Name(module, f"{role}@{v}"): t for v, pair in apart.versioned.items() for role, t in zip("UV", pair, strict=True)}
            yield State(pairs if apart.dense is None else {Name(module, f"D@{self.version}"): apart.dense})

    def fold(self, sums: State) -> None:
        """Stand on :meth:`sums`, wherever they lie now, and drop the deltas that nobody is sent any more."""
        self._stand_on(self.folded.onto(self.version, sums), self.head)
        self._forget()

    def _stand_on(self, folded: Folded, head: str) -> None:
        self.folded = folded
        self._view.residuals = {}
        self._view.apply(FrozenBundle(head, head, folded.sums))

    @property
    def first(self) -> Mapping[Name, int]:
        """The version in which each factor came to the log."""
        return self._first

    def view(self) -> FrozenView:
        """Return the frozen part at the head; it changes with the next append."""
        return self._view

    def deltas(self) -> Mapping[int, State]:
        """Return the deltas that still count by their version, in order, for checkpoints."""
        return self._deltas

    def sha256(self, state: State) -> str:
        """Hash a state and all that the log holds; where it may be folded, whether it is or not, its head stands for that."""
        if self.folded.version or self.outweighed():
            return hashlib.sha256(f"{sha256(state)}{self.head}".encode()).hexdigest()
        return sha256(state, *self._deltas.values())

    def bundle(self, since: int, sight: Sight = WHOLE) -> FrozenBundle | None:
        """Return what a holder of version ``since`` lacks, or None where it lacks nothing.

        Args:
            since: the version that it holds.
            sight: what it sees of the factors; of what adds to the frozen weights everybody sees all.
        """
        if since == self.version:
            return None
        whole = self._cheaper_whole(since)
        # A holder of what no longer counts is sent all, as one that holds nothing is: it need not have kept it.
        counts = 0 < self.folded.first <= since or any(version <= since for version in self._deltas)
        parent = self.heads[since] if counts else ROOT
        tensors: dict[Name, Tensor] = {name: tensor for module in whole for name, tensor in self._whole(module)}
        one_off = 0
        for version, delta in self._deltas.items():
            for name, tensor in delta.items() if version > since else ():
                added = name.role in ADDED
                if (added and name.module not in whole) or self._latest.get(name) == version:
                    seen = sight.of(name, tensor)
                    tensors[Name(name.module, f"{name.role}@{version}")] = seen
                    one_off += 0 if added or self._first[name] != version else seen.numel()
        return FrozenBundle(parent, self.head, State(tensors), one_off)

    def seen_by(self, sight: Sight) -> Sight:
        """Return a client's sight of the log: the whole, whatever else it sees cut, where that is all it sees here."""
        factors = ((name, t) for delta in self._deltas.values() for name, t in delta.items() if name.role not in ADDED)
        return sight if any(sight.of(name, tensor) is not tensor for name, tensor in factors) else WHOLE

    def _cheaper_whole(self, since: int) -> set[str]:
        """Modules whose ranks to send since a version exceed mn / (m + n)."""
        ranks: dict[str, int] = {}
        for delta in (delta for version, delta in self._deltas.items() if version > since):
            for name, left in delta.pick("U").items():
                ranks[name.module] = ranks.get(name.module, 0) + left.shape[1]
        heavy = {module for module, rank in ranks.items() if dense_is_cheaper(rank, *self._view.residuals[module].shape)}
        return heavy | self.folded.since(since)

    def _whole(self, module: str) -> Iterator[tuple[Name, Tensor]]:
        """Yield all that was added to a module in the form in which it is held; copied where the next version will write to it."""
        residual = self._view.residuals[module]
        if module in self.as_factors:
            residual.settle()
        if module in self.as_factors and residual.dense is None:
            yield from zip((Name(module, f"{role}@{self.version}") for role in "PQ"), joined(residual.pairs, torch.float32), strict=True)
        else:
            yield Name(module, f"D@{self.version}"), residual.matrix().clone()

    def rest(self, version: int, delta: State) -> None:
        """Have a delta lie elsewhere, on disk perhaps: the same values under the same names."""
        if version in self._deltas:
            self._deltas[version] = delta
            for name, left in delta.pick("U").items() if version > self.folded.version else ():
                self._view.residuals[name.module].move(version, left, delta[Name(name.module, "V")])


def head_of(parent: str, delta: State) -> str:
    """Return the head of the log that a delta leads to from ``parent``: a hash over names, shapes and values of the whole chain."""
    names = json.dumps(Layout.of(delta).shapes)
    return hashlib.sha256((parent + names + sha256(delta)).encode()).hexdigest()[:32]


def _versioned(delta: State, version: int) -> State:
    return State({Name(name.module, f"{name.role}@{version}"): t for name, t in delta.items()})
