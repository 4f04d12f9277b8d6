"""A client's part in one exchange: Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning".

It advertises keys, gives the others shares of them, masks its values, confirms to the others who has stayed, and says at the end, of each
client, a share of the one key or of the other: of its own mask where the values arrived, of its masks with others where they did not. The
protocol is that of section 4 over the complete graph, with the round of consistency (figure 4, round 3). Confirmations by as many as must
stay, more than half of the cohort, leave room for one list: a server that told each client another would else put together a sum over far
fewer, though it never had both seeds of one. What it leaves to :mod:`fedsb.secure.signing` is a server that forges clients.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from fedsb.secure import keys
from fedsb.secure.keys import BODY, KEY, SEALED, Secrets
from fedsb.secure.masks import Words, add_masks, adds
from fedsb.secure.session import SecureError, Session
from fedsb.secure.shamir import SHARE, split
from fedsb.secure.signing import SIGNATURE

ADVERTISED = BODY + SIGNATURE  # bytes
Check = Callable[[str, bytes, bytes], None]  # takes a client, what it advertises and the signature; raises UnsignedError


def unchecked(client: str, body: bytes, signature: bytes) -> None:
    """Take what the server says that a client has advertised."""


@dataclass
class Party:
    """What a client keeps from message to message of an exchange.

    Attributes:
        session: the exchange.
        client: the client's name.
        threshold: how many clients must be in the sum, by what the client itself knows of the run.
        secrets: its own.
        advertised: what it has said of them, signature included.
        peers: what all have advertised, by name, once they were shown.
        sealed: what it has sealed for each of the others then.
        shares: by name, of the seed of each one's own mask and behind it of the seed of its masks with others; its own share of itself
            first, and those of the others once they have come.
        masked: digest of what it has sent.
        terms: digest of what it was told of the round then.
        work: likewise, but for what two processes of one run may say otherwise and mean the same by.
        survivors: whose values have arrived, once it has confirmed them to the others.
        said: that answer; what it was made of is gone then, so that nobody who gets at this disk later can unmask more.
    """

    session: Session
    client: str
    threshold: int
    secrets: Secrets
    advertised: bytes
    peers: dict[str, bytes] = field(default_factory=dict)
    sealed: dict[str, bytes] = field(default_factory=dict)
    shares: dict[str, bytes] = field(default_factory=dict)
    masked: str = ""
    terms: bytes = b""
    work: bytes = b""
    survivors: tuple[str, ...] = ()
    said: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def begun(cls, session: Session, client: str, threshold: int, sign: Callable[[bytes], bytes]) -> Party:
        """Draw secrets for an exchange and advertise them; ``sign`` takes what is advertised."""
        drawn = Secrets.drawn()
        body = drawn.advertised(session, client)
        return cls(session, client, threshold, drawn, body + sign(body))

    def give(self, advertised: Mapping[str, bytes], check: Check = unchecked) -> dict[str, bytes]:
        """Return the shares of the own keys, sealed for each of the others; asked again, the same.

        Args:
            advertised: by client, what those who take part have advertised; this client is among them.
            check: holds the others' signatures.

        Raises:
            SecureError: this client is not among them as it is, they are too few, or not those of before.
            UnsignedError: by ``check``.
        """
        self._under_way()
        if self.peers:
            if self.peers != dict(advertised):
                raise SecureError("other keys than before are shown in the same exchange")
            return self.sealed
        if advertised.get(self.client) != self.advertised:
            raise SecureError(f"the keys that are shown as those of '{self.client}' are not its own")
        self._enough(advertised)
        for name, said in advertised.items():
            if len(said) != ADVERTISED:
                raise SecureError(f"the keys of '{name}' have {len(said)} bytes, expected {ADVERTISED}")
            if name != self.client:
                check(name, said[:BODY], said[BODY:])
        holders = sorted(advertised)
        own, masking = (split(seed, self.threshold, len(holders)) for seed in (self.secrets.own, self.secrets.masking))
        parts = {name: a + b for name, a, b in zip(holders, own, masking, strict=True)}
        self.shares = {self.client: parts.pop(self.client)}
        self.sealed = {
            name: keys.seal(self.secrets.sealing, advertised[name][:KEY], self.session, self.client, name, part)
            for name, part in parts.items()
        }
        self.peers = dict(advertised)
        return self.sealed

    def mask(self, words: Words, sealed: Mapping[str, bytes], terms: bytes) -> Words:
        """Return words with the own mask and those with all who have given shares; asked again, only the same words.

        Masks of clients that were told other terms do not cancel: a server that gives one client another weight, or another model to
        train from, so that the others' part of the sum is known to it, gets no sum.

        Args:
            words: the client's, as :class:`fedsb.secure.fixed_point.FixedPoint` encodes them.
            sealed: by client, what the others have sealed for this one.
            terms: digest of what all must have been told alike.

        Raises:
            SecureError: they are too few, are no shares, or other words were masked before: their difference would stand open.
        """
        self._under_way()
        given = {*sealed, self.client}
        self._enough(given)
        if strange := sorted(given - self.peers.keys()):
            raise SecureError(f"'{strange[0]}' gives shares and has shown no keys")
        shares = {name: self._opened(name, each) for name, each in sealed.items()} | {self.client: self.shares[self.client]}
        masked = words.copy()
        key = keys.masking_key(self.secrets.masking, self.session, self.client)
        pairs = {name: keys.pair_key(key, self.peers[name][KEY : 2 * KEY], self.session, self.client, name, terms) for name in sealed}
        own = keys.own_key(self.secrets.own, self.session, self.client)
        plus = [own, *(pair for name, pair in pairs.items() if adds(self.client, name))]
        add_masks(masked, plus, [pair for name, pair in pairs.items() if not adds(self.client, name)])
        digest = hashlib.sha256(masked.tobytes()).hexdigest()
        if self.masked not in ("", digest):
            raise SecureError("another upload was masked by the same keys; it is not sent, for the difference of the two would stand open")
        self.masked, self.shares, self.terms = digest, shares, terms
        return masked

    def _opened(self, name: str, sealed: bytes) -> bytes:
        if len(sealed) != SEALED or name == self.client:
            raise SecureError(f"the shares of '{name}' have {len(sealed)} bytes, expected {SEALED}")
        return keys.unseal(self.secrets.sealing, self.peers[name][:KEY], self.session, name, self.client, sealed)

    def confirm(self, survivors: Collection[str]) -> dict[str, bytes]:
        """Return what shows to each of the others in the sum that this client was told of these survivors; asked again, the same.

        Args:
            survivors: clients whose values have arrived.

        Raises:
            SecureError: they are too few, not among those who had given shares, without this client, or not those of before.
        """
        self._under_way()
        arrived = frozenset(survivors)
        self._enough(arrived)
        if self.survivors and self.survivors != tuple(sorted(arrived)):
            raise SecureError("other clients were confirmed to be in the sum before, and each exchange has one sum")
        if not self.masked or self.client not in arrived or not arrived <= self.shares.keys():
            raise SecureError("the clients that are said to be in the sum are not those that could be")
        self.survivors = tuple(sorted(arrived))
        return {name: self._confirmation(self.client, name) for name in self.survivors if name != self.client}

    def answer(self, survivors: Collection[str], confirmed: Mapping[str, bytes]) -> dict[str, bytes]:
        """Return, of each client that had given shares, a share of the one seed or of the other; never both.

        Args:
            survivors: clients whose values have arrived.
            confirmed: by client, what the others have confirmed to this one; what is none of theirs does not count.

        Raises:
            SecureError: this client has not confirmed these survivors, or too few of them have.
        """
        if self.survivors != tuple(sorted(survivors)):
            raise SecureError("shares are asked for a sum over other clients than this one has confirmed")
        if self.said:
            return self.said
        others = [name for name in self.survivors if name != self.client and name in confirmed]
        agree = 1 + sum(hmac.compare_digest(confirmed[name], self._confirmation(name, self.client)) for name in others)
        if agree < self.threshold:
            raise SecureError(f"{agree} clients confirm who is in the sum, and this one gives its part to no less than {self.threshold}")
        self.said = {name: both[:SHARE] if name in self.survivors else both[SHARE:] for name, both in self.shares.items()}
        self.secrets, self.shares, self.sealed = Secrets(b"", b"", b""), {}, {}
        return self.said

    def _confirmation(self, sender: str, receiver: str) -> bytes:
        other = receiver if sender == self.client else sender
        return keys.confirmation(self.secrets.sealing, self.peers[other][:KEY], self.session, (sender, receiver), self.survivors, other)

    def _under_way(self) -> None:
        if self.said:
            raise SecureError("the sum of this exchange is unmasked, and nothing is added to it any more")

    def _enough(self, clients: Collection[str]) -> None:
        if len(clients) < self.threshold:
            raise SecureError(f"{len(clients)} clients are in the sum, and this one gives its part to no less than {self.threshold}")
