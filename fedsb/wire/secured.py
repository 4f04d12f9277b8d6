"""What travels of a secure sum: what clients seal for each other, and masked words; and the bytes of a round's exchanges.

A round has five: keys, shares, the upload, who is in the sum, and what unmasks it. In each the server names members (of whom keys, shares
or values are there, in sorted order) and sends the number of the exchange, with what belongs to the members behind it in their order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Array

from fedsb.core.state import MASKED, SEALED, Layout, Name, State
from fedsb.secure.fixed_point import coded_words
from fedsb.secure.keys import CONFIRMED
from fedsb.secure.keys import SEALED as SHARES_BYTES
from fedsb.secure.masks import WORD, Words
from fedsb.secure.party import ADVERTISED
from fedsb.secure.session import ID, SecureError
from fedsb.secure.shamir import SHARE
from fedsb.wire.arrays import digest_of, encode_arrays

TERMS = 32  # bytes of a digest


@dataclass(frozen=True)
class Secured:
    """What an instruction says of a secure sum.

    Attributes:
        members: clients whose keys, shares or values are meant, in sorted order; none where keys are asked for.
        weights: of the members in the sum, in their order, not normalised.
        bound: of a value.
        sealed: the number of the exchange, and what belongs to the members.
    """

    members: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    bound: float = 0.0
    sealed: bytes = b""

    @property
    def session(self) -> bytes:
        """The number of the exchange."""
        return self.sealed[:ID]

    def share(self, client: str) -> float:
        """Return a member's share of the weights.

        Raises:
            SecureError: there is none.
        """
        total = sum(self.weights)
        if client not in self.members or len(self.weights) != len(self.members) or min(self.weights) < 0 or not 0 < total < math.inf:
            raise SecureError(f"{len(self.weights)} weights of {len(self.members)} clients give '{client}' none")
        return self.weights[self.members.index(client)] / total

    def terms(self, *more: object, flats: Mapping[str, torch.Tensor]) -> bytes:
        """Return the digest of what all clients of a round must have been told alike.

        Args:
            more: what a message says beside, in JSON's own types.
            flats: the packed state, by group.
        """
        return digest_of((self.members, self.weights, self.bound, *more), flats)

    def parts(self, names: Sequence[str], size: int) -> dict[str, bytes]:
        """Return what belongs to each of ``names``, so many bytes a name.

        Raises:
            SecureError: it is not as long.
        """
        return parted(self.sealed[ID:], names, size)


def parted(data: bytes, names: Sequence[str], size: int) -> dict[str, bytes]:
    """Cut what was joined into so many bytes a name.

    Raises:
        SecureError: it is not as long.
    """
    if len(data) != size * len(names) or len({*names}) != len(names):
        raise SecureError(f"{len(data)} bytes for {len(names)} clients, expected {size} for each")
    return {name: data[i * size : (i + 1) * size] for i, name in enumerate(names)}


def joined(parts: Mapping[str, bytes]) -> bytes:
    """Join parts in the order of their names."""
    return b"".join(parts[name] for name in sorted(parts))


def told_of(secured: Secured | None) -> dict[str, Any]:
    """Return what a configuration record says of it; ``sealed`` is an array."""
    if secured is None:
        return {}
    found: dict[str, Any] = {"members": list(secured.members)} if secured.members else {}
    return found | ({"weights": list(secured.weights), "bound": secured.bound} if secured.bound else {})


def read_secured(config: Mapping[str, Any], sealed: torch.Tensor | None) -> Secured | None:
    """Read it; None where an instruction says nothing of it."""
    if sealed is None:
        return None
    members = tuple(map(str, config.get("members", ())))
    weights = tuple(map(float, config.get("weights", ())))
    return Secured(members, weights, float(config.get("bound", 0.0)), sealed.numpy().tobytes())


def sealed_state(data: bytes) -> State:
    """Return bytes as a state that is encoded like any other."""
    return State({Name("", SEALED): torch.tensor(np.frombuffer(data, np.uint8))})


def sealed_layout(size: int) -> Layout:
    """Return the layout of so many bytes."""
    return Layout(((Name("", SEALED), (size,)),))


def sealed_arrays(data: bytes) -> dict[str, Array]:
    """Return bytes as they stand beside the arrays of an instruction."""
    return dict(encode_arrays(sealed_state(data)).items())


def bytes_of(state: State) -> bytes:
    """Return the bytes of a reply."""
    return state[Name("", SEALED)].numpy().tobytes()


def masked_state(words: Words, layout: Layout) -> State:
    """Return masked words as a state that is encoded like any other; they stand for an upload of some layout."""
    return State({_masked(layout): torch.from_numpy(words.view(np.int32))})


def masked_layout(layout: Layout) -> Layout:
    """Return the layout of an upload's masked words: as digest it has the upload's, in its name."""
    return Layout(((_masked(layout), (coded_words(layout.numel),)),))


def words_of(state: State) -> Words:
    """Return the masked words of a reply."""
    [words] = state.values()
    found: Words = words.numpy().view(np.uint32)
    return found


def _masked(layout: Layout) -> Name:
    return Name(f"{layout.digest:012x}", MASKED)


def bytes_up(values: int, clients: int) -> int:
    """Return the bytes that one of so many clients sends in a round in which none drops out."""
    return ADVERTISED + (clients - 1) * (SHARES_BYTES + CONFIRMED) + WORD * coded_words(values) + TERMS + clients * SHARE


def bytes_down(clients: int) -> int:
    """Return the bytes that it receives beside what it trains from."""
    return 5 * ID + clients * ADVERTISED + (clients - 1) * (SHARES_BYTES + CONFIRMED)
