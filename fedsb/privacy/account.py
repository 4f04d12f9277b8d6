"""A client's account in one run: the plan it may release, the ledger it is charged to, and what a reply says of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsb.core.disk import cut_torn, locked
from fedsb.core.state import State
from fedsb.privacy.accounting import epsilon_of
from fedsb.privacy.charges import Key
from fedsb.privacy.codes import BudgetExceeded
from fedsb.privacy.entries import UNNOISED, Entry
from fedsb.privacy.ledger import Ledger, read_entries
from fedsb.privacy.limit import Limit
from fedsb.privacy.naming import client_folder
from fedsb.privacy.plan import Plan
from fedsb.privacy.replies import KEPT_ROUNDS

LEDGERS = "ledgers"
DIAGNOSTICS = "diagnostics.jsonl"
TURNS = 16  # files by which messages wait for each other; of a run of its own each, mostly
# All that a private reply says beside its noised arrays, the number of examples and the layout's digest. Every value follows from the
# configuration, the number of examples and the ledger; none from what the examples are. ``encoding-error`` is what the wire's dtype took
# from the noised arrays.
ALLOWED = frozenset({"num-examples", "layout", "epsilon", "delta", "sampling-rate", "noise-multiplier", "steps", "encoding-error"})
# And of the metrics on what the client holds out: two noised means, and the noise's standard deviation, which follows from the plan.
EVALUATED = frozenset({"accuracy", "clipped_loss", "noise"})


@dataclass(frozen=True)
class Account:
    """One client and data set in one run.

    Attributes:
        ledger: on the client's own disk.
        plan: what the run may release.
        accountant: key of :data:`fedsb.privacy.accounting.ACCOUNTANTS`.
        max_epsilon: the client's budget over the whole ledger; None sets none.
        run: names the run in the ledger.
        repeatable: the noise of a key comes from the seed, as in a simulation: what is computed again is the same release.
        client: named in the keys of a ledger that several clients may share, as a real node's; empty in a simulation.
        own: the budgets of the node's operator, held beside the run's.
        names: of the run, beside ``run``; by any of them a budget of one run knows what it has released.
        request: digest of what the message at hand asks for, beside the key; a reply that was kept is an answer to that alone.
        rounds: so many of a run's last rounds have their replies kept.
    """

    ledger: Ledger
    plan: Plan
    accountant: str
    max_epsilon: float | None
    run: str
    repeatable: bool = False
    client: str = ""
    own: tuple[Limit, ...] = ()
    names: tuple[str, ...] = ()
    request: str = ""
    rounds: int = KEPT_ROUNDS

    def key(self, round_number: int, exchange: str) -> Key:
        """Name a release of this run."""
        return Key(self.run, round_number, exchange, self.client)

    def turn(self) -> AbstractContextManager[object]:
        """Keep other messages to the client in this run waiting inside the block, from looking for a kept reply to keeping one.

        A run that goes on asks again while a process of the node's may still be at work on what it was asked before.
        """
        if self.repeatable:
            return nullcontext()
        number = hashlib.sha256(json.dumps([self.run, self.client]).encode()).digest()[0] % TURNS
        return locked(self.ledger.folder / f"turn-{number}")

    def charged(self, key: Key) -> Entry:
        """Return what the ledger holds for a release, read back from the disk: what is done is held against it."""
        return next(entries[-1] for charged, entries in reversed(self.ledger.charges()) if charged == key)

    def kept(self, key: Key) -> tuple[State, dict[str, float]] | None:
        """Return the reply that was kept for a release where the same was asked for; None where it was not."""
        return self.ledger.kept(key, self.request)

    def keep(self, key: Key, state: State, metrics: Mapping[str, float]) -> None:
        """Keep the finished reply to a release."""
        self.ledger.keep(key, state, metrics, self.request, self.rounds)

    def charge(self, key: Key, entry: Entry) -> None:
        """Enter a release before it is computed; one that was entered before is not entered again where it is ``repeatable``.

        Raises:
            BudgetExceeded: it would take epsilon above the run's budget or the operator's; nothing is entered.
            UserError: another release was entered under that key.
        """
        if self.repeatable and self.ledger.holds(key, (entry,)):
            return
        whole, of_run = ([limit for limit in self._limits() if limit.of_run == own] for own in (False, True))
        try:
            self.ledger.charge(key, (entry,), limit=self._within(whole), run_limit=self._within(of_run), names=self.names)
        except BudgetExceeded:
            raise BudgetExceeded(self._overspent(key, entry)) from None

    def _limits(self) -> tuple[Limit, ...]:
        run = () if self.max_epsilon is None else (Limit(self.max_epsilon, self.plan.delta, "privacy.max_epsilon"),)
        return (*run, *self.own)

    def _within(self, limits: Sequence[Limit]) -> Callable[[Sequence[Entry]], bool] | None:
        """Return what tells whether entries keep within limits; None where there are none."""
        return (lambda entries: all(self._epsilon(entries, each.delta) <= each.epsilon for each in limits)) if limits else None

    def _overspent(self, key: Key, entry: Entry) -> str:
        """Say which limit a release would exceed, and by how much."""
        limits = self._limits()
        spent = {limit: self.ledger.entries({key.run, *self.names} if limit.of_run else None) for limit in limits}
        broken = next((each for each in limits if self._epsilon((*spent[each], entry), each.delta) > each.epsilon), limits[0])
        before, after = (self._epsilon(entries, broken.delta) for entries in (spent[broken], (*spent[broken], entry)))
        of = "of this run " if broken.of_run else ""
        return (
            f"{broken.key}={broken.epsilon:g} would be exceeded: '{self.ledger.folder}' holds epsilon {before:.3f} {of}at delta "
            f"{broken.delta:g}, and {after:.3f} with {key.exchange} of round {key.round}"
        )

    def _epsilon(self, entries: Sequence[Entry], delta: float | None = None) -> float:
        return epsilon_of(entries, self.plan.delta if delta is None else delta, self.accountant)

    def charge_unnoised(self, exchange: str) -> None:
        """Enter what leaves without noise, once a run: from then on the ledger's epsilon is infinite, in this run and in every later one.

        Raises:
            BudgetExceeded: there is a budget, which nothing un-noised fits.
        """
        key = self.key(0, exchange)
        if not self.ledger.holds(key, (UNNOISED,)):
            self.charge(key, UNNOISED)

    def metrics(self, entry: Entry) -> dict[str, float]:
        """Return what the reply to a release says: its entry, and epsilon of all that the ledger holds."""
        return {
            "epsilon": self._epsilon(self.ledger.entries()),
            "delta": self.plan.delta,
            "sampling-rate": entry.sampling_rate,
            "noise-multiplier": entry.noise_multiplier,
            "steps": entry.steps,
        }

    def note(self, key: Key, diagnostics: Mapping[str, float]) -> None:
        """Keep what only the client may know of a round beside its ledger."""
        with locked(self.ledger.folder / DIAGNOSTICS) as file:
            cut_torn(file)
            named = {name: value for name, value in key._asdict().items() if value != ""}
            file.write(json.dumps({**named, **diagnostics}).encode() + b"\n")

    def last_clip_norm(self, exchange: str, before: int) -> float | None:
        """Return where adaptive clipping left C in the run's last round ahead of ``before``: a noised release, so it may be used on."""
        mine = (self.run, exchange, self.client)
        rows = [row for row in _noted(self.ledger.folder) if (row["run"], row["exchange"], row.get("client", "")) == mine]
        return next((float(row["clip_norm"]) for row in reversed(rows) if row["round"] < before and "clip_norm" in row), None)


def charge_unnoised(ledger: Ledger, key: Key) -> None:
    """Enter what leaves without noise, once for ``key``: from then on the ledger's epsilon is infinite."""
    if not ledger.holds(key, (UNNOISED,)):
        ledger.charge(key, (UNNOISED,))


def allowed(metrics: Mapping[str, float], *, evaluation: bool = False) -> dict[str, float]:
    """Return what of a private client's metrics may leave it, in reply to training or to an evaluation."""
    keys = ALLOWED | EVALUATED if evaluation else ALLOWED
    return {key: value for key, value in metrics.items() if key in keys}


def charged_account(ledgers: Path, client: str, plan: Plan | None, accountant: str) -> dict[str, float] | None:
    """Return the account of a simulated client off its ledger, for one that was charged and did not answer; None where it has none."""
    path = ledgers / client_folder(client)
    if plan is None or not (path / "ledger.jsonl").is_file():
        return None
    entries = read_entries(path)
    return {
        "epsilon": epsilon_of(entries, plan.delta, accountant),
        "delta": plan.delta,
        "sampling-rate": plan.training.sampling_rate,
        "noise-multiplier": plan.training.noise_multiplier,
        "steps": plan.training.steps,
    }


def read_diagnostics(folder: Path, round_number: int) -> list[dict[str, Any]]:
    """Return what the clients of a simulation noted of a round, one row a client and exchange; later rows replace earlier ones."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob(f"*/{DIAGNOSTICS}")):
        for row in _noted(path.parent):
            if row["round"] == round_number:
                found[path.parent.name, row["exchange"]] = row
    return list(found.values())


def _noted(folder: Path) -> list[dict[str, Any]]:
    path = folder / DIAGNOSTICS
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    # A client killed while it wrote leaves a last line without its line feed.
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
