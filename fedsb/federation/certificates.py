"""What a federation over TLS needs and Flower does not make: an authority of its own, the SuperLink's certificate, keys of nodes.

Elliptic curves over P-384 throughout, as Flower takes them for nodes. Keys are written once, for their owner's eyes alone, and never
overwritten; what is public is.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedsb.core.errors import UserError

CA, LINK = "ca", "link"
CA_DAYS, LINK_DAYS = 3650, 825
HERE = ("127.0.0.1", "localhost")  # Flower's own processes and a proxy on the same machine reach the SuperLink so
NO_USE = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("encipher_only", "decipher_only"),
)
Key = ec.EllipticCurvePrivateKey


def certify(folder: Path, hosts: Sequence[str]) -> list[Path]:
    """Make a federation's authority where it is not there yet, and the SuperLink's certificate, anew each time; return what is there then.

    Args:
        folder: for ``ca.key``, ``ca.crt``, ``link.key`` and ``link.crt``.
        hosts: names and addresses under which nodes and submitters reach the SuperLink, beside :data:`HERE`.

    Raises:
        UserError: a host that is none, or an authority of which a part is missing.
    """
    names = [_name(host) for host in dict.fromkeys([*hosts, *HERE])]
    folder.mkdir(parents=True, exist_ok=True)
    key, certificate = _authority(folder)
    link = _key_at(folder / f"{LINK}.key")
    leaf = _builder(hosts[0] if hosts else HERE[0], certificate.subject, link.public_key(), LINK_DAYS, key.public_key())
    leaf = leaf.add_extension(x509.SubjectAlternativeName(names), critical=False)
    leaf = leaf.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    leaf = leaf.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    (folder / f"{LINK}.crt").write_bytes(leaf.sign(key, hashes.SHA384()).public_bytes(Encoding.PEM))
    return [folder / f"{name}.{kind}" for name in (CA, LINK) for kind in ("crt", "key")]


def _authority(folder: Path) -> tuple[Key, x509.Certificate]:
    secret, public = folder / f"{CA}.key", folder / f"{CA}.crt"
    if secret.exists() != public.exists():
        missing = public if secret.exists() else secret
        raise UserError(f"'{missing}' is missing beside its other half; bring it back, or take another folder")
    if public.exists():
        return _pair(secret, public)
    key = _key_at(secret)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fedsb federation")])
    made = _builder("fedsb federation", name, key.public_key(), CA_DAYS, key.public_key())
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    made = made.add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **dict.fromkeys(NO_USE, False)), critical=True)
    certificate = made.sign(key, hashes.SHA384())
    public.write_bytes(certificate.public_bytes(Encoding.PEM))
    return key, certificate


def _pair(secret: Path, public: Path) -> tuple[Key, x509.Certificate]:
    key = _key_at(secret)
    try:
        certificate = x509.load_pem_x509_certificate(public.read_bytes())
    except ValueError:
        raise UserError(f"'{public}' holds no certificate; bring it back, or take another folder") from None
    if certificate.public_key() != key.public_key():
        raise UserError(f"'{public}' is not of the key '{secret}'; bring its own back, or take another folder")
    return key, certificate


def _builder(
    name: str, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int, above: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name[:64])]))
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # a node's clock may be behind
        .not_valid_after(now + datetime.timedelta(days=days))
        # Python 3.13 trusts no certificate without these two.
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(above), critical=False)
    )


def _name(host: str) -> x509.GeneralName:
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    if not re.fullmatch(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*", host):
        raise UserError(f"--host {host[:80]!r} is neither an address nor a name; give --host federation.example.org,10.0.0.7")
    return x509.DNSName(host)


def _key_at(path: Path) -> Key:
    """Return the key that lies there, or a new one."""
    if path.exists():
        try:
            found = load_pem_private_key(path.read_bytes(), None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise UserError(f"'{path}' can't be read as a key without a password; bring the one back that was made here") from None
        if not isinstance(found, ec.EllipticCurvePrivateKey):
            raise UserError(f"'{path}' is no key of an elliptic curve; bring the one back that was made here")
        return found
    key = ec.generate_private_key(ec.SECP384R1())
    _write_secret(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return key


def node_key(path: Path) -> Path:
    """Make the key pair of a node, as ``ssh-keygen -t ecdsa -b 384`` does: ``path`` and ``path.pub``; return the public half.

    Raises:
        UserError: something is there.
    """
    public = path.with_name(f"{path.name}.pub")
    if taken := next((each for each in (path, public) if each.exists()), None):
        raise UserError(f"'{taken}' is there already, and a node's key is made once; take another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    _write_secret(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n")
    return public


def _write_secret(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
