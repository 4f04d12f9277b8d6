"""What a run may claim: epsilon with all that it depends on, or why there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NOT_COVERED = (
    "not covered: a person with several examples or at several clients, the tuning of hyper-parameters, "
    "floating-point attacks on the noise, secure aggregation (there is none)"
)
NO_MECHANISM = "no privacy mechanism"


@dataclass
class Claim:
    """Gathers what private clients say of their accounts, round by round.

    Attributes:
        unit: ``none``, ``example`` or ``client``.
        accountant: which one computed epsilon.
        reason: why nothing can be claimed whatever the accounts say; None where it can.
        charged: in a simulation, what a client's ledger holds, for one that failed after it was charged.
        accounts: the last account by client.
        silent: clients whose last request brought no account, so that their ledgers may hold more than they said.
    """

    unit: str
    accountant: str
    reason: str | None = None
    charged: Callable[[str], dict[str, float] | None] = lambda client: None
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
        if self.reason is not None or self.unit == "none" or not self.accounts:
            return None
        shown = {client: dict(account) for client, account in sorted(self.accounts.items())}
        values = [account["epsilon"] for account in shown.values()]
        noises = [account["noise-multiplier"] for account in shown.values()]
        return {
            "unit": self.unit,
            "delta": max(account["delta"] for account in shown.values()),
            "max": max(values),
            "min": min(values),
            "accountant": self.accountant,
            "simulated": simulated,
            "noise_multiplier": {"max": max(noises), "min": min(noises)},
            "clients": shown,
            "silent": sorted(self.silent),
        }

    def final(self, *, simulated: bool) -> dict[str, Any] | None:
        """Return epsilon of the whole run, with what it does not cover."""
        epsilon = self.epsilon(simulated=simulated)
        return None if epsilon is None else {**epsilon, "not_covered": NOT_COVERED}

    def why_none(self) -> str | None:
        """Return why there is no epsilon, or None where there is one."""
        if self.unit == "none":
            return NO_MECHANISM
        return self.reason or (None if self.accounts else "no private client has answered")
