"""The write-ahead ledger of one client and data set, in one folder on the client's own disk.

Every noisy release is charged before it is computed, so a crash can only make the account too high. ``ledger.jsonl`` holds a header
and one line a charge; it is only ever appended to, under an exclusive lock, and flushed to the disk before :meth:`Ledger.charge`
returns. Beside it lie the last finished replies: a repeated request is answered with the bytes that were already paid for, and what asks
for something else under the same key is not.

A last line without its line feed is a charge whose writer died before ``charge`` returned. Nothing was trained on it, so it is not
counted, and the next charge cuts it off. Any other line that cannot be read is an error: an account with a hole is no account.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from fedsb.core.disk import append_line, cut_torn, locked, make_folder, sync_folder
from fedsb.core.errors import UserError
from fedsb.core.state import State
from fedsb.privacy import replies
from fedsb.privacy.charges import Charge, Key, entries_in, of_one_run
from fedsb.privacy.codes import BudgetExceeded
from fedsb.privacy.entries import Entry, read_entry
from fedsb.privacy.replies import KEPT_ROUNDS, Reply

FORMAT = 1
LEDGER = "ledger.jsonl"
# The run in a simulation's keys. Its ledgers are its own: a resumed run has another id, and may lie in another folder.
SIMULATION = "simulation"


class Ledger:
    """The account in one folder. Any number of processes and threads may hold one of the same folder.

    Args:
        folder: created with mode 0700 if absent; one that exists keeps its mode.
        header: what the account is of (client, data set, unit, …), JSON values only; it is fixed by whoever opens the folder first.

    Raises:
        UserError: the folder holds an account with another header or format, or a line that cannot be read.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        self.folder = folder
        self.path = folder / LEDGER
        self._header: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **header}))
        make_folder(folder)
        with locked(self.path) as file:
            if not cut_torn(file):
                append_line(file, self._header)
                sync_folder(folder)
                sync_folder(folder.parent)
            self._read(file)

    def charge(
        self,
        key: Key,
        entries: Sequence[Entry],
        *,
        limit: Callable[[tuple[Entry, ...]], bool] | None = None,
        run_limit: Callable[[tuple[Entry, ...]], bool] | None = None,
        clients: Sequence[str] | None = None,
        names: Collection[str] = (),
        beside: Sequence[Charge] = (),
    ) -> None:
        """Enter releases that are about to be computed; when this returns they are on the disk.

        Args:
            key: what they are for. One that was charged before is charged again, as the next attempt.
            entries: the releases.
            limit: gets all releases, the new ones last, and says whether they are allowed. It runs under the lock, so two
                processes cannot both take what is left; for the same reason it must not ask the ledger for anything.
            run_limit: likewise, of the releases of the key's run alone, as :func:`of_one_run` tells it.
            clients: whom the releases cover, in a ledger of several clients; all where it is not given.
            names: of the run, beside that of the key.
            beside: charges of other ledgers that count in the account.

        Raises:
            BudgetExceeded: ``limit`` or ``run_limit`` returned False.
            UserError: a line on the disk cannot be read.
        """
        with locked(self.path) as file:
            cut_torn(file)
            charges = self._read(file)
            whole = (*beside, *charges)
            held = ((limit, whole), (run_limit, of_one_run(whole, {key.run, *names})))
            if any(holds is not None and not holds((*entries_in(each), *entries)) for holds, each in held):
                raise BudgetExceeded(f"the budget of '{self.folder}' does not allow exchange '{key.exchange}' of round {key.round}")
            attempt = 1 + sum(charge.key == key for charge in charges)
            covered: dict[str, Any] = {} if clients is None else {"clients": list(clients)}
            covered |= {"names": more} if (more := sorted({*names} - {key.run})) else {}
            append_line(file, {"key": key.written, "attempt": attempt, "entries": [asdict(entry) for entry in entries], **covered})

    def holds(self, key: Key, entries: Sequence[Entry]) -> bool:
        """Tell whether ``key`` was charged before.

        Raises:
            UserError: with other releases: what is about to be computed is not what was paid for.
        """
        held = next((earlier for charged, earlier in self.charges() if charged == key), None)
        if held is not None and held != tuple(entries):
            raise UserError(f"the ledger '{self.path}' holds another release for exchange '{key.exchange}' of round {key.round}")
        return held is not None

    def charges(self) -> list[tuple[Key, tuple[Entry, ...]]]:
        """Return all charges on the disk in order; a key is there once an attempt.

        Raises:
            UserError: a line cannot be read.
        """
        return [(charge.key, charge.entries) for charge in self.lines()]

    def lines(self) -> list[Charge]:
        """Return what is on the disk, line by line; see :meth:`charges`."""
        with locked(self.path) as file:
            return self._read(file)

    def entries(self, run: Collection[str] | None = None) -> tuple[Entry, ...]:
        """Return the releases of all charges in order, or of those of one run, by its names."""
        return entries_in(self.lines(), run)

    def entries_of(self, client: str) -> tuple[Entry, ...]:
        """Return the releases that cover one client, in a ledger of several."""
        with locked(self.path) as file:
            file.seek(0)
            records = [json.loads(line) for line in file.read().split(b"\n")[1:-1]]
        covering = [record for record in records if client in record.get("clients", [client])]
        return tuple(read_entry(entry) for record in covering for entry in record["entries"])

    def keep(self, key: Key, state: State, metrics: Mapping[str, float], request: str = "", rounds: int = KEPT_ROUNDS) -> None:
        """Keep the finished reply to ``key``; see :func:`fedsb.privacy.replies.keep`."""
        with locked(self.path):
            replies.keep(self.folder, Reply(key, request), state, metrics, rounds)

    def kept(self, key: Key, request: str = "") -> tuple[State, dict[str, float]] | None:
        """Return the reply that was kept for ``key`` and that request, with its metrics, bit for bit; None where there is none whole."""
        with locked(self.path):
            return replies.kept(self.folder, Reply(key, request))

    def answered(self, key: Key) -> bool:
        """Tell whether a whole reply to ``key`` is here, whatever was asked for."""
        with locked(self.path):
            return replies.kept(self.folder, Reply(key, None)) is not None

    def _read(self, file: BinaryIO) -> list[Charge]:
        file.seek(0)
        lines = file.read().split(b"\n")[:-1]
        charges = []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                if number == 1:
                    self._compare(dict(record))
                else:
                    key, entries = Key(*record["key"]), tuple(read_entry(entry) for entry in record["entries"])
                    charges.append(Charge(key, entries, frozenset((key.run, *map(str, record.get("names", ()))))))
            except UserError:
                raise
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"'{self.path}', line {number} is no entry of a privacy ledger; restore the file") from error
        return charges

    def _compare(self, found: Mapping[str, Any]) -> None:
        for name in sorted(found.keys() | self._header.keys(), key=lambda name: (name != "format", name)):
            held, asked = (json.dumps(h[name]) if name in h else "absent" for h in (found, self._header))
            if held != asked:
                raise UserError(f"the ledger '{self.path}' was kept with {name} = {held}, not {asked}; give the same, or another folder")


def read_charges(folder: Path) -> list[Charge]:
    """Return what a ledger holds, whatever its header says; nothing where there is no ledger, or it has no first line yet.

    Raises:
        UserError: a line cannot be read.
    """
    header = read_header(folder) if (folder / LEDGER).is_file() else {}
    return Ledger(folder, header).lines() if header else []


def read_entries(folder: Path) -> tuple[Entry, ...]:
    """Return the releases that a ledger holds; see :func:`read_charges`."""
    return entries_in(read_charges(folder))


def read_header(folder: Path) -> dict[str, Any]:
    """Return what a ledger is of; nothing where its writer died before it had a first line.

    Raises:
        UserError: its first line cannot be read.
    """
    path = folder / LEDGER
    with path.open(encoding="utf-8") as file:
        first = file.readline()
    try:
        header = json.loads(first) if first.endswith("\n") else {}
        return {key: value for key, value in header.items() if key != "format"}
    except (ValueError, AttributeError) as error:
        raise UserError(f"'{path}', line 1 is no header of a privacy ledger; restore the file") from error
