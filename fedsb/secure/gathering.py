"""The server's part in one exchange: it passes keys and shares on, adds up what is masked, and takes the masks off the sum."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from fedsb.secure import keys
from fedsb.secure.joining import joined
from fedsb.secure.keys import CONFIRMED, KEY
from fedsb.secure.masks import Words, add_masks, adds
from fedsb.secure.session import SecureError, Session


@dataclass
class Gathering:
    """What the server knows of an exchange.

    Attributes:
        session: the exchange.
        threshold: how many clients must stay.
        advertised: by client, what it has shown of its keys.
        sealed: by client, what it has sealed for each of the others.
        arrived: whose masked words are in the sum.
        confirmed: by client, what it has confirmed to each of the others in the sum.
        wrong: who has given wrong shares of others; known once the sum is unmasked.
    """

    session: Session
    threshold: int
    advertised: dict[str, bytes] = field(default_factory=dict)
    sealed: dict[str, dict[str, bytes]] = field(default_factory=dict)
    arrived: set[str] = field(default_factory=set)
    confirmed: dict[str, dict[str, bytes]] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)
    _total: Words | None = None

    def sealed_for(self, client: str) -> dict[str, bytes]:
        """Return what the others have sealed for a client, of those who have given shares."""
        return {name: given[client] for name, given in self.sealed.items() if name != client}

    def confirmed_for(self, client: str) -> dict[str, bytes]:
        """Return what the others in the sum have confirmed to a client; zeros of those who have said nothing."""
        return {name: self.confirmed.get(name, {}).get(client, bytes(CONFIRMED)) for name in self.arrived if name != client}

    def add(self, client: str, masked: Words) -> None:
        """Add a client's masked words to the sum."""
        self.arrived.add(client)
        if self._total is None:
            self._total = masked.copy()
        else:
            self._total += masked

    def unmasked(self, answers: Mapping[str, Mapping[str, bytes]], terms: bytes) -> Words:
        """Return the sum without masks.

        Args:
            answers: by client, its share of each one's seed.
            terms: that the clients say they were told.

        Raises:
            SecureError: fewer clients answered than are needed, or with too many wrong shares for the keys that were advertised.
        """
        if len(answers) < self.threshold:
            raise SecureError(f"{len(answers)} clients gave their shares, {self.threshold} are needed")
        assert self._total is not None
        total = self._total.copy()
        for client in sorted(self.sealed):
            shares = {holder: answers[holder][client] for holder in sorted(answers, key=lambda holder: (holder in self.wrong, holder))}
            if client in self.arrived:
                add_masks(total, [], [self._own_key(client, shares)])
            else:
                self._take_off_pairs(total, client, shares, terms)
        return total

    def _own_key(self, client: str, shares: Mapping[str, bytes]) -> bytes:
        committed = self.advertised[client][2 * KEY : 3 * KEY]
        seed = self._seed(client, shares, lambda seed: keys.commitment(seed, self.session, client) == committed)
        return keys.own_key(seed, self.session, client)

    def _seed(self, client: str, shares: Mapping[str, bytes], fits: Callable[[bytes], bool]) -> bytes:
        numbers = {name: number for number, name in enumerate(sorted(self.advertised), 1)}
        found = joined(shares, numbers, self.threshold, fits)
        if found is None:
            raise SecureError(
                f"no {self.threshold} of the {len(shares)} shares that were given of '{client}' give the key that it has advertised: those "
                "that it dealt out were wrong, or too many of these are"
            )
        self.wrong |= {*found[1]}
        return found[0]

    def _take_off_pairs(self, total: Words, dropped: str, shares: Mapping[str, bytes], terms: bytes) -> None:
        """Take off what those who stayed have added for the masks that they had with one who did not."""
        public = self.advertised[dropped][KEY : 2 * KEY]
        seed = self._seed(dropped, shares, lambda seed: keys.masking_public(seed, self.session, dropped) == public)
        key = keys.masking_key(seed, self.session, dropped)

        def pairs(others: Collection[str]) -> list[bytes]:
            return [keys.pair_key(key, self.advertised[other][KEY : 2 * KEY], self.session, dropped, other, terms) for other in others]

        added = {other for other in self.arrived if adds(other, dropped)}
        add_masks(total, pairs(self.arrived - added), pairs(added))
