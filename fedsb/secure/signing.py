"""Signatures under the keys that clients advertise, by the key of the node that serves them: a server can't forge clients then.

A node's key is that of ``fedsb federation node-key``, ECDSA on P-384; a signature travels as its two numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP384R1, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key, load_ssh_public_key

from fedsb.core.errors import UserError
from fedsb.secure.session import Session, UnsignedError

_NUMBER = 48  # bytes of each of a signature's two
SIGNATURE = 2 * _NUMBER
UNSIGNED = bytes(SIGNATURE)


def private_key(path: Path) -> EllipticCurvePrivateKey:
    """Read a node's private key, as ``fedsb federation node-key`` makes it.

    Raises:
        UserError: there is none.
    """
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UserError(f"'{path}' can't be read as a private key ({error}); make one by `fedsb federation node-key`") from None
    if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP384R1):
        raise UserError(f"'{path}' holds no P-384 key; make one by `fedsb federation node-key`")
    return key


def public_keys(path: Path) -> dict[str, EllipticCurvePublicKey]:
    """Read the keys of clients: a line each, its name and what stands in its node's ``.pub``; ``#`` begins a comment.

    Raises:
        UserError: a line is none, or names a client or has a key again: who holds a key of two clients would be both in a sum.
    """
    found: dict[str, EllipticCurvePublicKey] = {}
    lines_of: dict[bytes, int] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' can't be read ({error}); give a line 'CLIENT ecdsa-sha2-nistp384 AAAA…' for each client") from None
    for number, line in enumerate(lines, 1):
        if not (said := line.partition("#")[0].strip()):
            continue
        name, _, text = said.partition(" ")
        if name in found:
            raise UserError(f"line {number} of '{path}' names '{name}' again; name each client once")
        found[name] = _public_key(text.strip(), f"line {number} of '{path}'")
        point = found[name].public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
        if (first := lines_of.setdefault(point, number)) != number:
            raise UserError(f"lines {first} and {number} of '{path}' have one key for two clients; give each the .pub of its own node")
    if not found:
        raise UserError(f"'{path}' names no client; give a line 'CLIENT ecdsa-sha2-nistp384 AAAA…' for each")
    return found


def _public_key(text: str, where: str) -> EllipticCurvePublicKey:
    try:
        key = load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise UserError(f"{where} holds no key; write 'CLIENT ecdsa-sha2-nistp384 AAAA…', as the node's .pub has it") from None
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP384R1):
        raise UserError(f"{where} holds no P-384 key; `fedsb federation node-key` makes one")
    return key


def sign(key: EllipticCurvePrivateKey | None, session: Session, client: str, body: bytes) -> bytes:
    """Return the signature of what a client advertises in an exchange; zeros without a key."""
    if key is None:
        return UNSIGNED
    numbers = decode_dss_signature(key.sign(_signed(session, client, body), ECDSA(SHA384())))
    return b"".join(number.to_bytes(_NUMBER, "big") for number in numbers)


def check(keys: Mapping[str, EllipticCurvePublicKey], session: Session, client: str, body: bytes, signature: bytes) -> None:
    """Hold what a client is said to advertise against the key that is known for it.

    Raises:
        UnsignedError: there is none, or the signature is not by it, or not of this exchange.
    """
    if client not in keys:
        raise UnsignedError(f"'{client}' is none of the clients whose keys this node knows (secure.peers)")
    try:
        numbers = (int.from_bytes(signature[:_NUMBER], "big"), int.from_bytes(signature[_NUMBER:], "big"))
        keys[client].verify(encode_dss_signature(*numbers), _signed(session, client, body), ECDSA(SHA384()))
    except InvalidSignature:
        said = "unsigned" if signature == UNSIGNED else "not signed by its node's key"
        raise UnsignedError(f"the keys of '{client}' are {said} (secure.peers)") from None


def _signed(session: Session, client: str, body: bytes) -> bytes:
    return session.label("advertised keys", client) + body
