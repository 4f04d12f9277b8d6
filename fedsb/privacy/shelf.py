"""All ledgers of a real node's home, and which of them are one account because they are of the same data.

``joined.jsonl`` beside the ledgers is only ever appended to: a line joins two of them. It is written, and on the disk, before anything is
charged to the one on account of the other; so a crash can only leave two joined that need not be. Ledgers that are joined, over others
too, are one account: its releases are those of all. Its lock is that of the whole shelf.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fedsb.core.disk import append_line, cut_torn, locked, make_folder, sync_folder
from fedsb.core.errors import UserError
from fedsb.privacy.charges import Charge, Key, entries_in
from fedsb.privacy.entries import Entry
from fedsb.privacy.ledger import LEDGER, Ledger, read_charges
from fedsb.privacy.naming import DataName
from fedsb.privacy.rows import Hashes, add_hashes, read_hashes, read_salt

LOG = logging.getLogger(__name__)
JOINED, SALT, ROWS = "joined.jsonl", "salt", "rows"


class Shelf:
    """The folder of a home's ledgers. Any number of processes and threads may work on one.

    Args:
        folder: made if need be.

    Raises:
        UserError: the salt of the hashes that lie there is gone, or a ledger whose rows are there.
    """

    def __init__(self, folder: Path) -> None:
        make_folder(folder)
        self.folder = folder
        self.joined = folder / JOINED
        if not (folder / SALT).is_file() and any(folder.glob(f"*/{ROWS}")):
            raise UserError(f"'{folder / SALT}' is gone, and without it no row is known again; restore the file")
        if gone := next((ledger for ledger in self._ledgers() if not _begun(ledger)), None):
            raise UserError(
                f"'{gone}' is gone, and with it what was charged for rows that are known; restore the file, or remove its folder"
            )
        self.salt = read_salt(folder / SALT)

    def open(self, name: DataName, rows: Hashes) -> NodeLedger:
        """Return the ledger of data, joined to all that are of some of its rows, or of the same data under another name.

        Args:
            name: of the data.
            rows: of all its rows, by :func:`fedsb.privacy.rows.hash_rows` with :attr:`salt`.

        Raises:
            UserError: a ledger or ``joined.jsonl`` cannot be read.
        """
        ledger = NodeLedger(self, name)
        with locked(self.joined) as file:
            if not cut_torn(file):
                sync_folder(self.folder)
            self._pairs(file)
            known = read_hashes(ledger.folder / ROWS)
            fresh = rows[~np.isin(rows, known, assume_unique=True)]
            self._join(file, name, {*name.others, *self._earlier(name)})
            # Not by the fresh rows alone: joined.jsonl may have been lost.
            self._join(file, name, self._sharing(np.concatenate([known, fresh]), self._group(file, name.folder)), rows=True)
            if len(fresh):
                add_hashes(ledger.folder / ROWS, fresh)
                sync_folder(ledger.folder)
        return ledger

    def _earlier(self, name: DataName) -> list[str]:
        """Return the folders that earlier versions made for the same data."""
        return [path.name for ending in name.endings for path in self.folder.glob(f"*{ending}") if path.is_dir()]

    def _ledgers(self) -> list[Path]:
        """Return the ledgers whose rows are known; each was begun before."""
        return [path.with_name(LEDGER) for path in sorted(self.folder.glob(f"*/{ROWS}"))]

    def _sharing(self, rows: Hashes, group: Collection[str]) -> list[str]:
        """Return the folders, beside those of a group, that hold one of some rows."""
        others = (path for path in self.folder.glob(f"*/{ROWS}") if path.parent.name not in group)
        return [path.parent.name for path in others if np.isin(rows, read_hashes(path)).any()]

    def _join(self, file: BinaryIO, name: DataName, others: Collection[str], *, rows: bool = False) -> None:
        for other in sorted(others):
            if other in self._group(file, name.folder):
                continue
            if rows:
                LOG.warning("rows of '%s' are in the data of ledger '%s' too: from now on the two are one account", name.readable, other)
            append_line(file, {"ledgers": [name.folder, other]})

    def beside(self, file: BinaryIO, folder: str) -> list[Charge]:
        """Return the charges of all ledgers that one is joined to; ``file`` is the shelf's lock."""
        others = sorted(self._group(file, folder) - {folder})
        return [charge for other in others for charge in read_charges(self.folder / other)]

    def _group(self, file: BinaryIO, folder: str) -> set[str]:
        """Return a ledger and all that are joined to it, however far."""
        group, pairs = {folder}, self._pairs(file)
        while more := {other for pair in pairs if pair & group for other in pair} - group:
            group |= more
        return group

    def _pairs(self, file: BinaryIO) -> list[set[str]]:
        file.seek(0)
        pairs = []
        for number, line in enumerate(file.read().split(b"\n")[:-1], start=1):
            try:
                one, other = json.loads(line)["ledgers"]
                pairs.append({str(one), str(other)})
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"'{self.joined}', line {number} joins no two ledgers; restore the file") from error
        return pairs


def _begun(ledger: Path) -> bool:
    return ledger.is_file() and ledger.stat().st_size > 0


class NodeLedger(Ledger):
    """A ledger on a shelf: what is joined to it counts in its account."""

    def __init__(self, shelf: Shelf, name: DataName) -> None:
        super().__init__(shelf.folder / name.folder, {"unit": "example", "data": name.readable})
        self._shelf = shelf

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
        """Enter releases; ``limit`` and ``run_limit`` get those of the whole account."""
        with locked(self._shelf.joined) as file:
            joined = (*beside, *self._shelf.beside(file, self.folder.name))
            super().charge(key, entries, limit=limit, run_limit=run_limit, clients=clients, names=names, beside=joined)

    def entries(self, run: Collection[str] | None = None) -> tuple[Entry, ...]:
        """Return the releases of the whole account, or of it those of one run."""
        with locked(self._shelf.joined) as file:
            return entries_in((*self._shelf.beside(file, self.folder.name), *super().lines()), run)
