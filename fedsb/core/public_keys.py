"""Public keys, whatever form they come in."""

from __future__ import annotations

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key, load_ssh_public_key

KEYS_OF_SERVER = "FEDSB_NODE_KEYS"  # the list of `fedsb federation server`, for the runs on it
SSH = (b"ecdsa-", b"ssh-", b"sk-")


def normal_form(key: bytes) -> bytes:
    """Return a public key, in OpenSSH's form with or without a comment or as PEM, as DER: equal for equal keys.

    Raises:
        ValueError: it is none.
    """
    load = load_ssh_public_key if key.lstrip().startswith(SSH) else load_pem_public_key
    try:
        return load(key.strip() + b"\n").public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from None
