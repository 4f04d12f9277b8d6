"""What a holder of the frozen log has: bundles as they come, and the form of their content that a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fedsb.adapters.residual import Residual
from fedsb.core.state import Name, State, sha256

ROOT = "0" * 32
ADDED = ("U", "V", "D", "P", "Q")  # roles of what is added to the frozen weights; every other one is a factor
PAIRS = {"U": "V", "P": "Q"}


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
    """The frozen part in the form that a model takes: basis factors, and what was added to each module."""

    basis: State = field(default_factory=State)
    residuals: dict[str, Residual] = field(default_factory=dict)
    _hashed: tuple[State, str] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def factors_sha256(self) -> str:
        """Hash the basis, once for each that this view has had: it may weigh more than a round's work on it."""
        if self._hashed is None or self._hashed[0] is not self.basis:
            self._hashed = (self.basis, sha256(self.basis))
        return self._hashed[1]

    def apply(self, bundle: FrozenBundle) -> None:
        """Bring this view from ``bundle.parent`` to ``bundle.head``, in version order."""
        versioned = sorted(bundle.state.items(), key=lambda item: (int(item[0].role.split("@")[1]), item[0]))
        for (module, role), tensor in versioned:
            kind, version = role.split("@")
            if kind not in ADDED:
                self.basis = self.basis.merge(State({Name(module, kind): tensor}))
            elif kind == "D":
                self._of(module, tensor.shape, bundle).become(tensor)
            elif kind in PAIRS:
                right = bundle.state[Name(module, f"{PAIRS[kind]}@{version}")]
                residual = self._of(module, (len(tensor), right.shape[1]), bundle)
                (residual.add if kind == "U" else residual.shrink_to)(int(version), tensor, right)

    def beside(self, made: State) -> FrozenView:
        """Return this view and factors that its holder has made itself."""
        if not len(made):
            return self
        # The same object from round to round where nothing else is held: models place it once.
        return FrozenView(self.basis.merge(made) if len(self.basis) else made, self.residuals)

    def _of(self, module: str, shape: Sequence[int], bundle: FrozenBundle) -> Residual:
        residual = self.residuals.setdefault(module, Residual(*shape))
        residual.token = bundle.head
        return residual
