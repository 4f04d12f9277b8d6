"""Which ledger of a real node's home is that of its data: named after where they lie, or as the operator says."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

OLD_DIGITS = 12  # of the digest that ended a folder's name in earlier versions, behind a readable part


@dataclass(frozen=True)
class DataName:
    """What a ledger is of.

    Attributes:
        folder: of the ledger, below the folder of all ledgers.
        readable: for people; it decides nothing.
        others: folders of the same data under its other names; some may never be there.
        endings: how earlier versions ended the names of this data's folders.
    """

    folder: str
    readable: str
    others: tuple[str, ...] = ()
    endings: tuple[str, ...] = ()


def name_of_data(client: str, data_path: str | None, ledger: str | None = None) -> DataName:
    """Name the ledger of a real node's data.

    A path counts as the file that it leads to, however it is written: with ``~``, over links, from another working directory. Neither the
    data's content names a ledger, as one more row would start a new account for the rows that were there before, nor the client.

    Args:
        client: whom the node serves; names the ledger where the data ship in a package.
        data_path: the operator's own data.
        ledger: the operator's own name for data that move or come in versions; what was charged under the path stays with it.
    """
    plain = _of_path(data_path) if data_path else DataName(f"client-{_digest(client)}", client, (client_folder(client),))
    if not ledger:
        return plain
    return DataName(f"name-{_digest(ledger)}", ledger, (plain.folder, *plain.others), plain.endings)


def _of_path(path: str) -> DataName:
    real = os.path.realpath(Path(path).expanduser())
    # Earlier versions did not expand "~".
    endings = dict.fromkeys(f"-{_digest(place)[:OLD_DIGITS]}" for place in (real, os.path.realpath(path)))
    return DataName(_digest(real), Path(real).name, endings=tuple(endings))


def client_folder(client: str) -> str:
    """Return the name of a simulated client's folder: its own, as far as a file system takes it."""
    readable = "".join(c if c.isalnum() or c in "-_" else "_" for c in client)[:48]
    return readable if readable == client else f"{readable}-{_digest(client)[:OLD_DIGITS]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
