"""Writes each round to the run's folder and shows it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedsb.core.logs import IN_FILE_ALONE
from fedsb.core.state import State
from fedsb.privacy.account import LEDGERS, read_diagnostics
from fedsb.privacy.claim import Claim
from fedsb.report.progress import Progress
from fedsb.report.selection import Selection
from fedsb.report.table import round_line
from fedsb.run.checkpoint import Carried, Snapshot, save_checkpoint
from fedsb.run.folder import RunFolder
from fedsb.run.records import RoundRecord
from fedsb.trackers import Feed
from fedsb.wire.frozen import FrozenLog

LOG = logging.getLogger(__name__)
DIAGNOSED = {"loss": "train_loss", "clip_rate": "clip_rate", "signal_to_noise": "signal_to_noise", "clip_norm": "clip_norm"}

ACCOUNTS, SILENT = "accounts", "silent"


class RunListener:
    """The listener of a run.

    Args:
        folder: of the run.
        progress: shows it.
        claim: what can be said of epsilon.
        simulated: tells whether the clients are simulated; known once the nodes are.
        server_accounts: every client's account in the server's ledger, under client-level privacy.
        carried: gives what the strategy carries on; checkpoints hold it.
        run: fingerprint of the configuration.
        keep: number of checkpoints to keep.
        feed: of the trackers; None where there are none.
        selection: by what a round is chosen; None: the last one is.
        validated: what each round was measured at on the validation part.
    """

    def __init__(
        self,
        folder: RunFolder,
        progress: Progress,
        claim: Claim,
        *,
        simulated: Callable[[], bool],
        server_accounts: Callable[[], dict[str, dict[str, float]]] | None = None,
        carried: Callable[[], Carried] = Carried,
        run: str = "",
        keep: int = 1,
        feed: Feed | None = None,
        selection: Selection | None = None,
        validated: Mapping[int, Mapping[str, float]] | None = None,
    ) -> None:
        self.records: list[RoundRecord] = []
        self.claim = claim
        self._folder = folder
        self._progress = progress
        self._simulated = simulated
        self._server_accounts = server_accounts
        self._carried = carried
        self._run = run
        self._keep = keep
        self._feed = feed or Feed({}, folder.path)
        self._selection = selection
        self._validated = {} if validated is None else validated

    def resume(self, records: Sequence[RoundRecord], carried: Carried) -> None:
        """Go on after the rounds of ``records``, with what was known of the clients' accounts."""
        self.records = list(records)
        self.claim.accounts = {client: dict(account) for client, account in carried.facts[ACCOUNTS].items()}
        self.claim.silent = set(carried.facts[SILENT])

    def say(self, line: str) -> None:
        """Show a line, and log it."""
        LOG.info(line)
        self._progress.say(line)

    def begin(self, round_number: int, clients: Sequence[str], stage: str) -> None:
        """Show that an exchange begins; those of the start have a line each, since their round's line comes late."""
        if stage:
            self.say(f"{stage}, {len(clients)} clients")
        LOG.debug("round %d asks %s", round_number, ", ".join(clients))
        self._progress.begin(round_number, clients)

    def reply(self, client: str, ok: bool) -> None:
        """Show a reply."""
        if self.claim.unit == "none" or self._simulated():  # the order in which replies come is one of time
            LOG.debug("reply of %s %s", client, "counts" if ok else "does not count")
        self._progress.reply(client, ok)

    def stopped(self, record: RoundRecord | None) -> None:
        """Append the record of a round that stopped the run: its failures count like any other's."""
        if record is not None:
            record = self._with_privacy(record)
            self._tell(record)
            self._keep_record(record)

    def end(self, record: RoundRecord, state: State, frozen: FrozenLog) -> None:
        """Append the record, save a checkpoint, print the round's line."""
        record = replace(self._with_privacy(record), validation=self._validated.get(record.round, {}))
        self.records.append(record)
        self._tell(record)
        self._keep_record(record)
        self._save(record.round, state, frozen)
        self._progress.end(record)
        if record.round == self.best:
            LOG.info("round %d is the best so far on the validation part", record.round)
        if self.over() and record.round < self._progress.num_rounds:
            since = "in any round" if self.best is None else f"since round {self.best}"
            self.say(f"no gain on the validation part {since} (eval.patience): no more rounds")

    @property
    def last(self) -> int:
        """The last round that there is a record of."""
        return max(record.round for record in self.records)

    @property
    def selected(self) -> dict[str, Any] | None:
        """The choice of a round so far, as ``summary.json`` has it; None where none is made."""
        found = self._selection.told(self.records) if self._selection else None
        return found and {**found, "stopped": self.over() and self.records[-1].round < self._progress.num_rounds}

    @property
    def best(self) -> int | None:
        """The round that is chosen so far; None where none is."""
        return self.selected["round"] if self.selected else None

    def over(self) -> bool:
        """Tell whether no more rounds are worth their while."""
        return self._selection is not None and self._selection.over(self.records)

    def _keep_record(self, record: RoundRecord) -> None:
        self._folder.append(record)
        self._feed.record(record)

    def _tell(self, record: RoundRecord) -> None:
        """Log a round, and why each of its failures was none of its replies."""
        LOG.info(round_line(record, self._progress.num_rounds))
        for client, reason in record.failed.items():
            LOG.warning("round %d: %s failed: %s", record.round, client, reason, extra=IN_FILE_ALONE)

    def _save(self, number: int, state: State, frozen: FrozenLog) -> None:
        carried = self._carried()
        facts = {**carried.facts, ACCOUNTS: self.claim.accounts, SILENT: sorted(self.claim.silent)}
        snapshot = Snapshot(number, state, frozen, Carried(carried.states, facts))
        save_checkpoint(self._folder.checkpoints, snapshot, run=self._run, keep=self._keep, spare=self.best)
        LOG.debug("checkpoint of round %d is on disk", number)

    def _with_privacy(self, record: RoundRecord) -> RoundRecord:
        """Add epsilon so far, and keep what no noise covers to simulations."""
        if self.claim.unit == "none":
            return record
        if self._server_accounts is None:
            self.claim.note(record.accounts, tuple(record.failed))
        else:
            self.claim.note(self._server_accounts(), ())
        simulated = self._simulated()
        uncovered = {**record.simulation_only, **self._diagnosed(record)} if simulated else {}
        # In dispatch order they would be ranked by their numbers of examples.
        names: dict[str, Any] = {"clients": tuple(sorted(record.clients)), "failed": dict(sorted(record.failed.items()))}
        times: dict[str, Any] = {} if simulated else {"wall_s": None, "cpu_s": None}
        shown: dict[str, Any] = {
            "epsilon": self.claim.epsilon(simulated=simulated),
            "epsilon_reason": self.claim.why_none(),
            "simulation_only": uncovered,
        }
        return replace(record, accounts={}, train_loss=None, **shown, **names, **times)

    def _diagnosed(self, record: RoundRecord) -> dict[str, float]:
        """Return the means of what the simulated clients noted for themselves."""
        loss = {} if record.train_loss is None else {"train_loss": record.train_loss}
        rows = read_diagnostics(self._folder.path / LEDGERS, record.round)
        found = {name: [row[key] for row in rows if key in row] for key, name in DIAGNOSED.items()}
        return loss | {name: sum(values) / len(values) for name, values in found.items() if values}
