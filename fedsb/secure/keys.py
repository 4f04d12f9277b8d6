"""A client's keys of one exchange, what it advertises of them, and what two clients agree on (X25519, HKDF-SHA256, AES-256-GCM).

Everything that is drawn is drawn anew in each exchange by the operating system: a key that is given away to unmask one sum says nothing
about another.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Collection
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedsb.secure.session import SecureError, Session
from fedsb.secure.shamir import SECRET, SHARE

KEY = 32  # bytes of a public key, and of one that two agree on
BODY = 3 * KEY  # of what is advertised, but for the signature
SEALED = 2 * SHARE + 16  # bytes of the two shares that one client gives another, with the tag of the cipher
CONFIRMED = 16  # bytes by which one client confirms to another who has stayed
_NONCE = bytes(12)  # a key seals one message and no other


@dataclass(frozen=True)
class Secrets:
    """What a client draws.

    Attributes:
        sealing: private key that opens what others seal for it.
        masking: seed of the private key of its masks with others; shared, for the case that the client drops out.
        own: seed of the mask of its own; shared, for the case that it does not.
    """

    sealing: bytes
    masking: bytes
    own: bytes

    @classmethod
    def drawn(cls) -> Secrets:
        """Draw them."""
        return cls(secrets.token_bytes(KEY), secrets.token_bytes(SECRET), secrets.token_bytes(SECRET))

    def advertised(self, session: Session, client: str) -> bytes:
        """Return the public keys for sealing and for masks, and what holds the client to the seed of its own mask."""
        sealing = X25519PrivateKey.from_private_bytes(self.sealing).public_key().public_bytes_raw()
        return sealing + masking_public(self.masking, session, client) + commitment(self.own, session, client)


def derived(secret: bytes, label: bytes) -> bytes:
    """Return a key of :data:`KEY` bytes for the purpose that ``label`` names."""
    return HKDF(SHA256(), KEY, salt=None, info=label).derive(secret)


def masking_key(seed: bytes, session: Session, client: str) -> X25519PrivateKey:
    """Return the private key of a client's masks with others."""
    return X25519PrivateKey.from_private_bytes(derived(seed, session.label("masking key", client)))


def masking_public(seed: bytes, session: Session, client: str) -> bytes:
    """Return its public half."""
    return masking_key(seed, session, client).public_key().public_bytes_raw()


def commitment(own: bytes, session: Session, client: str) -> bytes:
    """Return what shows a seed of a client's own mask to be that one; of 248 bits that nobody can guess it tells nothing."""
    return hashlib.sha256(session.label("own seed", client) + own).digest()


def own_key(own: bytes, session: Session, client: str) -> bytes:
    """Return the key of a client's own mask."""
    return derived(own, session.label("own mask", client))


def pair_key(key: X25519PrivateKey, public: bytes, session: Session, client: str, other: str, terms: bytes) -> bytes:
    """Return the key of the mask that two clients have in common: the same from either side, where both were told the same ``terms``.

    Raises:
        SecureError: ``public`` is no key.
    """
    return derived(_agreed(key, public, other), session.label("pair mask", *sorted((client, other)), terms.hex()))


def _agreed(key: X25519PrivateKey, public: bytes, other: str) -> bytes:
    try:
        return key.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:  # a point of small order, with which everybody agrees on zero
        raise SecureError(f"the key of '{other}' is none") from None


def seal(sealing: bytes, public: bytes, session: Session, sender: str, receiver: str, shares: bytes) -> bytes:
    """Encrypt two shares for ``receiver``; once in an exchange, for the key is made for this one message.

    Raises:
        SecureError: ``public`` is no key.
    """
    return AESGCM(_tied_key("sealed", sealing, public, session, sender, receiver, receiver)).encrypt(_NONCE, shares, None)


def unseal(sealing: bytes, public: bytes, session: Session, sender: str, receiver: str, sealed: bytes) -> bytes:
    """Decrypt what ``sender`` has sealed for ``receiver``.

    Raises:
        SecureError: it is not that.
    """
    try:
        return AESGCM(_tied_key("sealed", sealing, public, session, sender, receiver, sender)).decrypt(_NONCE, sealed, None)
    except InvalidTag:
        raise SecureError(f"what '{sender}' is said to have sealed for '{receiver}' is not of '{sender}'") from None


def confirmation(sealing: bytes, public: bytes, session: Session, pair: tuple[str, str], survivors: Collection[str], other: str) -> bytes:
    """Return what shows to a client that another one was told of these survivors (HMAC-SHA256, cut to :data:`CONFIRMED` bytes).

    It stands in place of a signature (Bonawitz et al. 2017, figure 4, round 3): only the two have its key, and each knows what it has said
    itself. Where nodes sign what they advertise, that signature covers the key that this one is agreed on by.

    Args:
        sealing: private key of one of the two.
        public: of ``other``, the one for sealing.
        session: the exchange.
        pair: who confirms, and to whom.
        survivors: clients whose values are in the sum.
        other: of the two.

    Raises:
        SecureError: ``public`` is no key.
    """
    key = _tied_key("survivors", sealing, public, session, *pair, other)
    return hmac.digest(key, json.dumps(sorted(survivors)).encode(), "sha256")[:CONFIRMED]


def _tied_key(purpose: str, sealing: bytes, public: bytes, session: Session, sender: str, receiver: str, other: str) -> bytes:
    agreed = _agreed(X25519PrivateKey.from_private_bytes(sealing), public, other)
    return derived(agreed, session.label(purpose, sender, receiver))
