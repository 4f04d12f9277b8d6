"""What an exchange of keys belongs to: run, round, and a number that is drawn anew each time; keys of one are of no use in another."""

from __future__ import annotations

import json
from dataclasses import dataclass

from fedsb.core.errors import UserError

ID = 16  # bytes


class SecureError(UserError):
    """What the other side asks for, or has sent, does not hold: nothing is answered."""


class UnsignedError(SecureError):
    """Keys are not signed by the key that this node knows for their client."""


@dataclass(frozen=True)
class Session:
    """One exchange.

    Attributes:
        run: name of the run.
        round: of the run.
        id: drawn by the server for this exchange, :data:`ID` bytes: a round that is begun again has another.
        settings: digest of the run's configuration. Messages of an exchange may each bring one, and those who were told different ones
            can use neither each other's keys nor their signatures.
    """

    run: str
    round: int
    id: bytes
    settings: str

    def label(self, purpose: str, *names: str) -> bytes:
        """Return what ties a key or a signature to this exchange, a purpose and clients."""
        return json.dumps(["fedsb secure sum 2", purpose, self.run, self.round, self.id.hex(), self.settings, *names]).encode()
