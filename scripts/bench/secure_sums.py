"""What a secure sum costs: bytes beside a plain round's, and CPU of a client and of the server, one thread, with and without dropouts.

Run as ``python scripts/bench/secure_sums.py [--clients 25] [--modules 224] [--rank 32] [--turns 5]``: Fed-SB's cores of Mistral-7B by
default. Each client's part is answered as a node answers it, with what it keeps on disk; the values are random. Medians over all clients
and turns, the slowest beside. What Flower's messages weigh by themselves is taken from docs/federation.md, and the hashing of the frozen
factors that a process was sent is timed alone: a worker does it once a run, without one it is done in each round. Exit status 1 if a bound
fails.
"""

from __future__ import annotations

import argparse
import hashlib
import secrets
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from figures import Figure, show

from fedsb.app.secured import Desk
from fedsb.config.compose import load
from fedsb.config.schema import Config
from fedsb.core.state import Layout, Name, State
from fedsb.run.resuming import PATHS, fingerprint
from fedsb.secure.fixed_point import FixedPoint
from fedsb.secure.gathering import Gathering
from fedsb.secure.keys import CONFIRMED, SEALED
from fedsb.secure.masks import Words
from fedsb.secure.party import ADVERTISED
from fedsb.secure.session import ID, Session
from fedsb.secure.shamir import SHARE
from fedsb.secure.threshold import threshold_of
from fedsb.wire.arrays import layout_bytes
from fedsb.wire.messages import Instruction
from fedsb.wire.secured import TERMS, Secured, bytes_down, bytes_of, bytes_up, joined, parted, words_of

BOUND, RUN = 0.05, "0" * 32
MORE_MESSAGES = 4  # than a plain round has: keys, shares, the list of who stayed, and what unmasks
MESSAGE_BYTES = 30_000  # that a message costs on the wire whatever it holds, up and down together, TLS included (docs/federation.md)
Result = TypeVar("Result")


class Timed:
    """CPU seconds by what they were spent for."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)

    def __call__(self, who: str, what: Callable[[], Result]) -> Result:
        """Return what a call returns, and add its time to what was spent by ``who``."""
        begun = time.process_time()
        result = what()
        self.spent[who] += time.process_time() - begun
        return result


def main() -> int:
    """Print bytes and seconds, and hold them against their bounds."""
    options, clients = parse(), []
    torch.set_num_threads(1)
    upload = State({Name(f"{i:03d}", "R"): torch.randn(options.rank, options.rank) * 0.01 for i in range(options.modules)})
    names = [f"client-{i:04d}" for i in range(options.clients)]
    server: dict[int, list[float]] = {0: [], int(0.3 * options.clients): []}
    for turn in range(options.turns):
        for dropped in server:
            timed = Timed()
            with tempfile.TemporaryDirectory() as folder:
                rounded(names, names[len(names) - dropped :], upload, Path(folder), turn + 1, timed)
            server[dropped].append(timed.spent.pop("server"))
            clients += [timed.spent[name] for name in names[: len(names) - dropped]]
    values, plain = upload.numel, layout_bytes(Layout.of(upload))
    up, down = bytes_up(values, len(names)), plain + bytes_down(len(names))
    print(f"{len(names)} clients, {values:,} values each")
    print(f"bytes of a client and round: {plain:,} up and down without, {up:,} up and {down:,} down with")
    for dropped, seconds in server.items():
        print(f"server, {dropped} dropped out: {median(seconds):.3f} s CPU ({min(seconds):.3f}-{max(seconds):.3f})")
    print(f"client: {median(clients):.3f} s CPU (slowest {max(clients):.3f})")
    hashing = hashed(options.frozen_mb)
    wire = (up + down + (1 + MORE_MESSAGES) * MESSAGE_BYTES) / (2 * plain + MESSAGE_BYTES)
    shown = [
        show(Figure("bytes of a round over plain ones", (up + down) / (2 * plain), 1.3)),
        show(Figure(f"the same on the wire, with {MORE_MESSAGES} messages more", wire)),
        show(Figure("CPU seconds of a client with a worker, median", median(clients), 0.3)),
        show(Figure("CPU seconds of a client without, which hashes what it was sent in each round", median(clients) + hashing, 0.3)),
    ]
    return 0 if all(figure.holds for figure in shown) else 1


def rounded(names: list[str], dropped: list[str], upload: State, folder: Path, number: int, timed: Timed) -> None:
    """Take an exchange from keys to the sum, and hold that it is the sum."""
    config = configured(names)
    session = Session(RUN, number, secrets.token_bytes(ID), fingerprint(config, without=PATHS))
    server = Gathering(session, threshold_of(len(names), config.federation.secure_dropout))
    stayed = [name for name in names if name not in dropped]

    def desk(client: str, members: list[str] | tuple[()] = (), sealed: bytes = b"") -> Desk:
        told = Secured(tuple(members), (1.0,) * len(members), BOUND, session.id + sealed)
        return Desk(config, Instruction(client, number, origin=RUN, secured=told), folder / client, None)

    for name in names:
        server.advertised[name] = bytes_of(timed(name, desk(name).advertise))
    shown = joined(server.advertised)
    assert len(shown) == ADVERTISED * len(names)
    for name in names:
        sealed = bytes_of(timed(name, desk(name, names, shown).give))
        server.sealed[name] = parted(sealed, [other for other in names if other != name], SEALED)
    for name in stayed:
        sealed = joined(server.sealed_for(name))
        masked = words_of(timed(name, lambda name=name, sealed=sealed: desk(name, names, sealed).mask(upload, State(), 1)))  # type: ignore[misc]
        timed("server", lambda name=name, masked=masked: server.add(name, masked))  # type: ignore[misc]
    for name in stayed:
        confirmed = bytes_of(timed(name, desk(name, stayed).confirm))
        server.confirmed[name] = parted(confirmed, [other for other in stayed if other != name], CONFIRMED)
    told = {name: joined(server.confirmed_for(name)) for name in stayed}
    said = {name: bytes_of(timed(name, desk(name, stayed, told[name]).answer)) for name in stayed}
    answers = {name: parted(data[TERMS:], names, SHARE) for name, data in said.items()}
    total: Words = timed("server", lambda: server.unmasked(answers, said[names[0]][:TERMS]))
    mean, _ = FixedPoint(BOUND, len(names)).decode(total, len(stayed) / len(names))
    flat = torch.cat([t.reshape(-1) for t in upload.values()]).double().clamp(-BOUND, BOUND)
    assert float((torch.from_numpy(mean) - flat).abs().max()) < 1e-8


def hashed(megabytes: int) -> float:
    """Return the CPU seconds of hashing so much."""
    data, begun = bytes(megabytes * 1_000_000), time.process_time()
    hashlib.sha256(data)
    return time.process_time() - begun


def configured(names: list[str]) -> Config:
    """Return the configuration of a run with secure sums."""
    secure = ["federation.secure_sum=true", "federation.exactness=false", f"federation.names=[{','.join(names)}]"]
    return load(["method=fed_sb", "init.kind=orthogonal", *secure])


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, value in (("clients", 25), ("modules", 224), ("rank", 32), ("turns", 5), ("frozen-mb", 335)):
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
