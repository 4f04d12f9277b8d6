"""Whether a SuperLink can be had from here, before Flower tries for long: its port, its certificate, its clock."""

from __future__ import annotations

import http.client
import ssl
import time
from contextlib import closing
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from fedsb.core.errors import UserError
from fedsb.runtime.connection import FlowerError

WAIT_S = 10.0
# A SuperNode signs the time of each request. flwr 1.41 and 1.42 take some 300 s of delay, and 5 s from the future (flwr.common.constant).
BEHIND_S, AHEAD_S = 300.0, 5.0
ROUNDING_S = 1.0  # of the date that a server sends


def check_reach(address: str, authority: Path) -> None:
    """Shake hands with a SuperLink, and hold its clock against this one.

    Args:
        address: ``HOST:PORT``.
        authority: certificate of the authority.

    Raises:
        UserError: the address is none, or the certificate is not that of this host or authority.
        FlowerError: nobody answers, or one of the two clocks is off.
    """
    host, port = split(address)
    try:
        trusted = ssl.create_default_context(cafile=str(authority))
    except (OSError, ssl.SSLError):
        raise UserError(f"'{authority}' holds no certificate; take ca.crt from whoever runs the SuperLink") from None
    try:
        skew = _skew(host, port, trusted)
    except ssl.SSLCertVerificationError as error:
        raise UserError(_mistrust(address, authority, error)) from None
    except ssl.SSLError:
        raise UserError(f"{address} speaks no TLS; is that the SuperLink's port, and was it started without --insecure?") from None
    except (OSError, http.client.HTTPException) as error:
        raise FlowerError(f"no SuperLink answers at {address}: {getattr(error, 'strerror', None) or error}") from None
    if skew is not None and not -BEHIND_S - ROUNDING_S <= skew <= AHEAD_S + ROUNDING_S:
        way = "ahead of" if skew > 0 else "behind"
        raise FlowerError(
            f"this machine's clock is {abs(skew):.0f} s {way} that of {address}, and keys are taken up to {AHEAD_S:g} s ahead and "
            f"{BEHIND_S:g} s behind; set the one that is off"
        )


def split(address: str) -> tuple[str, int]:
    """Return host and port.

    Raises:
        UserError: the address has another form.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"'{address}' is no address; give HOST:PORT, as in federation.example.org:443")
    return host.strip("[]"), int(port)


def _skew(host: str, port: int, trusted: ssl.SSLContext) -> float | None:
    """Return by how many seconds this clock is ahead of the other; None where that tells no time."""
    with closing(_connection(host, port, trusted)) as connection:
        connection.request("GET", "/health")
        told = connection.getresponse().getheader("date")
    try:
        return None if told is None else time.time() - parsedate_to_datetime(told).timestamp()
    except ValueError:
        return None


def _connection(host: str, port: int, trusted: ssl.SSLContext) -> http.client.HTTPSConnection:
    """Return a connection that goes the way of Flower's own: through HTTPS_PROXY, but for what NO_PROXY names."""
    proxy = urlsplit(getproxies().get("https", ""))
    if not proxy.hostname or proxy_bypass(host):
        return http.client.HTTPSConnection(host, port, timeout=WAIT_S, context=trusted)
    connection = http.client.HTTPSConnection(proxy.hostname, proxy.port or 80, timeout=WAIT_S, context=trusted)
    connection.set_tunnel(host, port)
    return connection


def joined(host: str, port: int) -> str:
    """Return the address at which a server that listens on ``host`` is reached from its own machine."""
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{here}]:{port}" if ":" in here else f"{here}:{port}"


def _mistrust(address: str, authority: Path, error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code in (HOSTNAME_MISMATCH, IP_MISMATCH):
        return f"the certificate of {address} is for other names; 'fedsb federation init FOLDER --host {split(address)[0]}' there makes one"
    why = {CERT_NOT_YET_VALID: "is not valid yet", CERT_HAS_EXPIRED: "has expired"}.get(error.verify_code)
    if why:
        return f"the certificate of {address} {why}, by this machine's clock; 'fedsb federation init FOLDER' there makes another"
    return f"the certificate of {address} is not of the authority in '{authority}'; take ca.crt from whoever runs the SuperLink"


# of openssl/x509_vfy.h
CERT_NOT_YET_VALID, CERT_HAS_EXPIRED, HOSTNAME_MISMATCH, IP_MISMATCH = 9, 10, 62, 64
