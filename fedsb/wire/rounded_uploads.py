"""What becomes of an upload on its way: as it is, rounded, or as an int8 difference with error feedback.

In int8 a client sends what it has changed, ``Q(x − x0 + e)``: both sides know ``x0``, what the client was sent, to the bit, and 8 bits of
a round's change say more than 8 bits of a head or a factor that hardly moved. What rounding leaves out, ``e' = (x − x0 + e) − Q(…)``,
stays with the client and is added to its next upload, once this one counts (error feedback: Seide et al. 2014; Karimireddy et al. 2019,
arXiv:1901.09847; with local steps Basu et al. 2019, arXiv:1906.02367). So the sum of what was decoded is the sum of what was meant less the
last ``e``, which is at most half a step of a block. ``e`` is a function of uploads as they were before rounding: where those are private,
after their noise, so is all that follows from them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fedsb.core.state import State, non_finite
from fedsb.wire.arrays import INT8, quantise


@dataclass(frozen=True)
class Rounded:
    """An upload as it travels.

    Attributes:
        sent: what is encoded: the upload, or its difference to what the client was sent; in int8 already rounded, so that it has the same
            bytes whenever it is encoded.
        decoded: the upload as the server has it.
        left: what rounding has left out so far, by name; empty where nothing is carried on.
    """

    sent: State
    decoded: State
    left: State = field(default_factory=State)


@dataclass(frozen=True)
class Rounding:
    """How a client's uploads are rounded.

    Attributes:
        dtype: of the wire.
        begun: gives what the client was sent, by name, also of what it does not upload.
        carried: what rounding has left out of uploads that counted.
        roles: whose rounding is carried on.
    """

    dtype: str = "float32"
    begun: Callable[[], State] = State
    carried: State = field(default_factory=State)
    roles: tuple[str, ...] = ()

    def of(self, upload: State) -> Rounded:
        """Round an upload."""
        if self.dtype != INT8:
            return Rounded(upload, quantise(upload, self.dtype))
        begun = self.begun()
        meant = State({name: self.carried.get(name, 0) + (t - begun[name] if name in begun else t) for name, t in upload.items()})
        sent = quantise(meant, INT8)
        decoded = State({name: t + begun[name] if name in begun else t for name, t in sent.items()})
        return Rounded(sent, decoded, self._left(meant, sent))

    def _left(self, meant: State, sent: State) -> State:
        """Return what is carried on; nothing of an upload that is not finite, which does not count."""
        found = State({name: t - sent[name] for name, t in meant.items() if name.role in self.roles})
        return State() if non_finite(found) else self.carried.merge(found)
