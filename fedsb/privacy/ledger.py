"""The write-ahead ledger of one client and data set, in one folder on the client's own disk.

Every noisy release is charged before it is computed, so a crash can only make the account too high. ``ledger.jsonl`` holds a header
and one line a charge; it is only ever appended to, under an exclusive lock, and flushed to the disk before :meth:`Ledger.charge`
returns. Beside it lie the last finished replies: a repeated request is answered with the bytes that were already paid for.

A last line without its line feed is a charge whose writer died before ``charge`` returned. Nothing was trained on it, so it is not
counted, and the next charge cuts it off. Any other line that cannot be read is an error: an account with a hole is no account.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedsb.core.disk import append_line, cut_torn, locked, make_folder, replace_whole, sync_folder
from fedsb.core.errors import UserError
from fedsb.core.state import Name, State, sha256
from fedsb.privacy.codes import BudgetExceeded
from fedsb.privacy.entries import Entry, read_entry

FORMAT = 1
LEDGER = "ledger.jsonl"
KEPT_REPLIES = 4
# The run in a simulation's keys. Its ledgers are its own: a resumed run has another id, and may lie in another folder.
SIMULATION = "simulation"


class Key(NamedTuple):
    """What a charge was made for: the run, the round (0 is the start), the exchange within it, and the client.

    The client is empty where a ledger has one only, and in ledgers of earlier versions.
    """

    run: str
    round: int
    exchange: str
    client: str = ""

    @property
    def written(self) -> tuple[str | int, ...]:
        """The key as files hold it."""
        key = (self.run, self.round, self.exchange)
        return (*key, self.client) if self.client else key


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
    ) -> None:
        """Enter releases that are about to be computed; when this returns they are on the disk.

        Args:
            key: what they are for. One that was charged before is charged again, as the next attempt.
            entries: the releases.
            limit: gets all releases, the new ones last, and says whether they are allowed. It runs under the lock, so two
                processes cannot both take what is left; for the same reason it must not ask the ledger for anything.
            run_limit: likewise, of the releases of the key's run alone.
            clients: whom the releases cover, in a ledger of several clients; all where it is not given.

        Raises:
            BudgetExceeded: ``limit`` or ``run_limit`` returned False.
            UserError: a line on the disk cannot be read.
        """
        with locked(self.path) as file:
            cut_torn(file)
            charges = self._read(file)
            of_run = [charge for charge in charges if charge[0].run == key.run]
            held = ((limit, charges), (run_limit, of_run))
            if any(holds is not None and not holds((*_flat(each), *entries)) for holds, each in held):
                raise BudgetExceeded(f"the budget of '{self.folder}' does not allow exchange '{key.exchange}' of round {key.round}")
            attempt = 1 + sum(earlier == key for earlier, _ in charges)
            covered = {} if clients is None else {"clients": list(clients)}
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
        with locked(self.path) as file:
            return self._read(file)

    def entries(self, run: str | None = None) -> tuple[Entry, ...]:
        """Return the releases of all charges in order, or of those of one run."""
        return _flat([charge for charge in self.charges() if run in (None, charge[0].run)])

    def entries_of(self, client: str) -> tuple[Entry, ...]:
        """Return the releases that cover one client, in a ledger of several."""
        with locked(self.path) as file:
            file.seek(0)
            records = [json.loads(line) for line in file.read().split(b"\n")[1:-1]]
        covering = [record for record in records if client in record.get("clients", [client])]
        return tuple(read_entry(entry) for record in covering for entry in record["entries"])

    def keep(self, key: Key, state: State, metrics: Mapping[str, float]) -> None:
        """Keep the finished reply to ``key``, atomically, in place of an earlier one.

        Only the last ``KEPT_REPLIES`` stay on the disk. A request for an older one has to be recomputed, as a new charge.
        """
        with locked(self.path):
            # What another writer left half written; the lock says that none is at work.
            for leftover in self.folder.glob("reply-*.part"):
                leftover.unlink()
            number = 1 + max((int(path.name.split("-")[1]) for path in self._replies()), default=0)
            replace_whole(self.folder / f"reply-{number:010d}-{_digest(key)}.safetensors", _encode(key, state, metrics))
            earlier = self._replies()[:-1]
            others = [path for path in earlier if path not in self._replies(key)]
            for path in earlier:
                if path not in others[-KEPT_REPLIES + 1 :]:
                    path.unlink()

    def kept(self, key: Key) -> tuple[State, dict[str, float]] | None:
        """Return the reply that was kept for ``key`` with its metrics, bit for bit; None where there is none or it is damaged."""
        with locked(self.path):
            found = (_decode(path, key) for path in reversed(self._replies(key)))
            return next((reply for reply in found if reply is not None), None)

    def _replies(self, key: Key | None = None) -> list[Path]:
        """The replies on the disk, oldest first; of one key, or of all."""
        return sorted(self.folder.glob(f"reply-*-{_digest(key) if key else '*'}.safetensors"))

    def _read(self, file: BinaryIO) -> list[tuple[Key, tuple[Entry, ...]]]:
        file.seek(0)
        lines = file.read().split(b"\n")[:-1]
        charges = []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                if number == 1:
                    self._compare(dict(record))
                else:
                    charges.append((Key(*record["key"]), tuple(read_entry(entry) for entry in record["entries"])))
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


def read_entries(folder: Path, run: str | None = None) -> tuple[Entry, ...]:
    """Return the releases that a ledger holds, whatever its header says; none where there is no ledger, or it has no first line yet.

    Args:
        folder: of the ledger.
        run: whose releases alone are asked for; None: those of all.

    Raises:
        UserError: a line cannot be read.
    """
    header = read_header(folder) if (folder / LEDGER).is_file() else {}
    return Ledger(folder, header).entries(run) if header else ()


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


def _flat(charges: Sequence[tuple[Key, tuple[Entry, ...]]]) -> tuple[Entry, ...]:
    return tuple(entry for _, entries in charges for entry in entries)


def _digest(key: Key) -> str:
    """A name for ``key`` that any file system takes: what a run is called is the sender's choice."""
    return hashlib.sha256(json.dumps(key.written).encode()).hexdigest()[:32]


def _encode(key: Key, state: State, metrics: Mapping[str, float]) -> bytes:
    # Copied, as safetensors refuses tensors that share memory.
    tensors = {f"{name.role}|{name.module}": t.detach().cpu().contiguous().clone() for name, t in state.items()}
    return save(tensors, {"key": json.dumps(key.written), "metrics": json.dumps(dict(metrics)), "sha256": sha256(state)})


def _decode(path: Path, key: Key) -> tuple[State, dict[str, float]] | None:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = State({Name(*reversed(name.split("|", 1))): file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        if (metadata["key"], metadata["sha256"]) != (json.dumps(key.written), sha256(state)):
            return None
        return state, json.loads(metadata["metrics"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
