"""What a run may claim: epsilon with all that it depends on, or why there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ATTACKS = (
    "the tuning of hyper-parameters, attacks on floating-point noise or on a generator that is not cryptographic; that only sums are seen "
    "is not counted on"
)
# A node's ledger knows earlier runs on its data; the server's is of one run.
NOT_COVERED = {
    "example": "a person with several examples or at several clients, what left the data past the node's ledger (under another FEDSB_HOME, "
    f"before rows were edited), the time of a reply, that a row lies in two of a node's data sets (their accounts are one then), {ATTACKS}",
    "client": f"a person at several clients, other runs with the same clients (each claims for itself alone), whose reply did not count, "
    f"and why, {ATTACKS}",
}
NO_MECHANISM = "no privacy mechanism"


@dataclass
class Claim:
    """Gathers what private clients say of their accounts, round by round.

    Attributes:
        unit: ``none``, ``example`` or ``client``.
        accountant: which one computed epsilon.
        reason: why nothing can be claimed whatever the accounts say; None where it can.
        charged: in a simulation, what a client's ledger holds, for one that failed after it was charged.
        target: epsilon that the run was asked to keep to; a real node's ledger may hold more from earlier runs.
        accounts: the last account by client.
        silent: clients whose last request brought no account, so that their ledgers may hold more than they said.
    """

    unit: str
    accountant: str
    reason: str | None = None
    charged: Callable[[str], dict[str, float] | None] = lambda client: None
    target: float | None = None
    accounts: dict[str, dict[str, float]] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)

    def note(self, accounts: Mapping[str, Mapping[str, float]], failed: Sequence[str]) -> None:
        """Take in a round: the accounts of those that answered, and who did not."""
        self.accounts |= {client: dict(account) for client, account in accounts.items()}
        read = {client: account for client in failed if (account := self.charged(client)) is not None}
        self.accounts |= read
        self.silent = (self.silent - accounts.keys() - read.keys()) | (set(failed) - read.keys())

    def epsilon(self, *, simulated: bool) -> dict[str, Any] | None:
        """Return epsilon so far: ``max``, ``min`` and the list over clients; None where none can be claimed."""
        if self.why_none() is not None:
            return None
        shown = {client: dict(account) for client, account in sorted(self.accounts.items())}
        values = [account["epsilon"] for account in shown.values()]
        noises = [account["noise-multiplier"] for account in shown.values()]
        return {
            "unit": self.unit,
            "delta": max(account["delta"] for account in shown.values()),
            "max": max(values),
            "min": min(values),
            "target": self.target,
            "accountant": self.accountant,
            "simulated": simulated,
            "noise_multiplier": {"max": max(noises), "min": min(noises)},
            "clients": shown,
            "silent": sorted(self.silent),
        }

    def final(self, *, simulated: bool) -> dict[str, Any] | None:
        """Return epsilon of the whole run, with what it does not cover."""
        epsilon = self.epsilon(simulated=simulated)
        return None if epsilon is None else {**epsilon, "not_covered": NOT_COVERED[self.unit]}

    def why_none(self) -> str | None:
        """Return why there is no epsilon, or None where there is one."""
        if self.unit == "none":
            return NO_MECHANISM
        bare = [client for client, account in self.accounts.items() if math.isinf(account["epsilon"])]
        if self.reason is None and bare:
            return f"epsilon of the ledger of '{bare[0]}' is infinite: a release of this or an earlier run on that data had no noise"
        return self.reason or (None if self.accounts else "no private client has answered")
