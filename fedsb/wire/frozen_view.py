"""What a holder of the frozen log has: bundles as they come, and the form of their content that a model takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import chain, count

import torch

from fedsb.adapters.residual import Residual
from fedsb.core.state import Layout, Name, State, sha256

ROOT = "0" * 32
ADDED = ("U", "V", "D", "P", "Q")  # roles of what is added to the frozen weights; every other one is a factor
PAIRS = {"U": "V", "P": "Q"}
_APPLIED = count()  # of bundles, in this process


class FrozenMissing(LookupError):
    """The chain up to a head is not complete in this cache: the holder must ask for it."""


@dataclass(frozen=True)
class FrozenBundle:
    """The deltas from one head to another. Roles carry the version behind an ``@``: ``U@3``, ``D@5``, ``A@1``.

    Attributes:
        parent, head: where it leads from and to.
        state: what the holder of ``parent`` lacks.
        one_off: number of values that are delivered once in a run: first versions of factors. Known to the server alone.
    """

    parent: str
    head: str
    state: State
    one_off: int = 0


@dataclass
class FrozenView:
    """The frozen part in the form that a model takes: basis factors, and what was added to each module.

    Attributes:
        basis: factors.
        residuals: what was added, by module.
        by_head: whether a head names its content. Who is told heads knows that of none: what came under one before may have been another,
            and a model that holds that is not to be left as it is.
    """

    basis: State = field(default_factory=State)
    residuals: dict[str, Residual] = field(default_factory=dict)
    by_head: bool = True
    _applied: int = field(default=0, init=False, repr=False, compare=False)
    _hashed: tuple[tuple[State, int], str] | None = field(default=None, init=False, repr=False, compare=False)

    def content(self, as_factors: Collection[str] = ()) -> str:
        """Hash all that is held, names and shapes included: the same whatever bundles it came in, and whatever they are called.

        Once for each content that this view has had: it may weigh more than a round's work on it.

        Args:
            as_factors: modules whose additions are held as factors.
        """
        if self._hashed is None or self._hashed[0][0] is not self.basis or self._hashed[0][1] != self._applied:
            digest = hashlib.sha256(f"{json.dumps(Layout.of(self.basis).shapes)}{sha256(self.basis)}".encode())
            for module, residual in sorted(self.residuals.items()):
                held = residual.apart(as_factors=module in as_factors)
                # Pairs as they came: processors round their product otherwise, and nodes have several kinds of them.
                values = (*([] if held.dense is None else [held.dense]), *chain(*held.pairs))
                digest.update(json.dumps([module, *(list(value.shape) for value in values)]).encode())
                for value in values:
                    digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False).data)
            self._hashed = (self.basis, self._applied), digest.hexdigest()
        return self._hashed[1]

    def apply(self, bundle: FrozenBundle) -> None:
        """Bring this view from ``bundle.parent`` to ``bundle.head``, in version order."""
        self._applied += 1
        token = bundle.head if self.by_head else f"{bundle.head}, bundle {next(_APPLIED)} here"
        versioned = sorted(bundle.state.items(), key=lambda item: (int(item[0].role.split("@")[1]), item[0]))
        for (module, role), tensor in versioned:
            kind, version = role.split("@")
            if kind not in ADDED:
                self.basis = self.basis.merge(State({Name(module, kind): tensor}))
            elif kind == "D":
                self._of(module, tensor.shape, token).become(tensor)
            elif kind in PAIRS:
                right = bundle.state[Name(module, f"{PAIRS[kind]}@{version}")]
                residual = self._of(module, (len(tensor), right.shape[1]), token)
                (residual.add if kind == "U" else residual.shrink_to)(int(version), tensor, right)

    def beside(self, made: State) -> FrozenView:
        """Return this view and factors that its holder has made itself."""
        if not len(made):
            return self
        # The same object from round to round where nothing else is held: models place it once.
        return FrozenView(self.basis.merge(made) if len(self.basis) else made, self.residuals, self.by_head)

    def _of(self, module: str, shape: Sequence[int], token: str) -> Residual:
        residual = self.residuals.setdefault(module, Residual(*shape))
        residual.token = token
        return residual
