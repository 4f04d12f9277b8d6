"""What the server sends down and what it meant to, and uploads that come as differences to it.

A wire of int8 rounds what is sent. Error feedback keeps what that left out, ``e = meant − sent``, at the server, and a round's uploads,
which are differences to what was sent, are added to ``sent + e``: to what the server meant. So the server's values are never rounded, and
what clients hold is off by one rounding however long a run is, where values that were rounded again in every round would drift, and stand
still where a round's change is below half a step. With a mean this is the classic ``Q(x + e)``. What is sent is a state and no difference,
the same for all, so that a client may miss rounds. A run begins at what clients decode of its first state. ``e`` is a function of what was
aggregated: after a server's noise, post-processing.

A rule that makes up for the rounding of what it hands out, as FedEx-LoRA's residual does, hands it out rounded, and leaves nothing out.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord

from fedsb.adapters import AdapterSpec, Layouts
from fedsb.adapters.redrawn import Redrawn, shortened
from fedsb.core.blocks import Sight
from fedsb.core.state import Layout, State, pack, unpack
from fedsb.wire.arrays import INT8, decode_state, encode_arrays


def carried_roles(spec: AdapterSpec, anew: Collection[str]) -> tuple[str, ...]:
    """Return the roles of which clients may add what rounding left out of one upload to the next.

    Args:
        spec: the adapter family.
        anew: factors that the method's rule makes anew in each round.
    """
    up = {role for turn in range(1, spec.turns + 1) for role in spec.uploaded(turn)}
    return tuple(sorted((up | ({spec.head.name} if spec.head.up else set())) - {*spec.fresh, *anew}))


@dataclass(frozen=True)
class Share:
    """What a client is sent of a state.

    Attributes:
        arrays: as they travel.
        layout: theirs.
        ranks: how many components of each module they have, in sorted order; none where that is all.
        made_in: the round by which the others are drawn.
    """

    arrays: ArrayRecord
    layout: Layout
    ranks: tuple[int, ...] = ()
    made_in: int = 0


class Shares:
    """What clients of each layout are sent of one state.

    Args:
        down: the layout of the whole.
        arrays: the whole as it travels.
        meant: the whole before it was rounded.
        dtype: of the wire.
        redrawn: draws components that then need not be sent; None: all are sent.
    """

    def __init__(self, down: Layout, arrays: ArrayRecord, meant: State, dtype: str, redrawn: Redrawn | None = None) -> None:
        self._redrawn = redrawn
        self._shares = {} if redrawn else {down: Share(arrays, down)}
        self._meant = meant
        self._dtype = dtype

    def of(self, layouts: Layouts) -> Share:
        """Return what clients of some layouts are sent: of a smaller rank its block of each factor, and of that what must be sent."""
        if layouts.down not in self._shares:
            seen = layouts.sight.state(self._meant)
            self._shares[layouts.down] = self._cut(seen, layouts.down) if self._redrawn else Share(self._encoded(seen), layouts.down)
        return self._shares[layouts.down]

    def _encoded(self, state: State) -> ArrayRecord:
        return encode_arrays(state, self._dtype)

    def _cut(self, seen: State, layout: Layout) -> Share:
        assert self._redrawn is not None
        ranks = self._redrawn.ranks(self._meant)
        short = shortened(layout, ranks)
        if short == layout:
            return Share(self._encoded(seen), layout)
        sent = {name.module: shape[0] for name, shape in short.shapes if name.role == "A"}
        return Share(self._encoded(Sight(short).state(seen)), short, tuple(sent[module] for module in sorted(sent)), self._redrawn.round)


class Sending:
    """What was sent down, and what rounding left out of it.

    Args:
        dtype: of the wire.
        feedback: whether what rounding leaves out is kept.

    Attributes:
        left: ``meant − sent`` by name; empty where nothing is kept.
    """

    def __init__(self, dtype: str, *, feedback: bool) -> None:
        self._dtype = dtype
        self.keeps = dtype == INT8 and feedback
        self.left = State()
        self._begun: dict[Layout, tuple[_Base, _Base]] = {}  # by the layout of the upload

    def meant(self, sent: State) -> State:
        """Return what was meant by what was sent; the same where nothing was left out."""
        return sent.merge(State({name: sent[name] + t for name, t in self.left.items()})) if len(self.left) else sent

    def settle(self, meant: State, sent: State) -> None:
        """Keep what is left out of ``sent``, which is ``meant`` as clients decode it, by the names in ``sent``."""
        if self.keeps:
            self.left = self.left.merge(State({name: meant[name].float() - t for name, t in sent.items()}))

    def begin(self) -> None:
        """Forget what the last round began from."""
        self._begun = {}

    def trained(self, upload: State, layouts: Layouts, up: Layout, whole: State, shares: Shares) -> tuple[State, State]:
        """Return an upload as its client trained it: from what the server meant to send, and from what the client was sent.

        Args:
            upload: as decoded.
            layouts: the client's.
            up: that of the upload.
            whole: what all clients hold beside the state, and the state as it was meant.
            shares: what was sent.
        """
        if self._dtype != INT8:
            return upload, upload
        if up not in self._begun:
            seen = layouts.sight.state(whole)
            self._begun[up] = _Base(up, seen), _Base(up, seen.merge(decode_state(shares.of(layouts).arrays, layouts.down)))
        meant, held = self._begun[up]
        return meant.onto(upload), held.onto(upload)


class _Base:
    """What differences of one layout are added to: 0 for what their clients were not sent."""

    def __init__(self, up: Layout, begun: State) -> None:
        self._up = up
        self._flats = pack(State({name: begun[name] if name in begun else torch.zeros(shape) for name, shape in up.shapes}))

    def onto(self, difference: State) -> State:
        return unpack({group: self._flats[group] + flat for group, flat in pack(difference).items()}, self._up)
