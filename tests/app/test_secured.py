"""What a client keeps of a secure sum from message to message, each in what may be another process, and what it refuses."""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from fedsb.app.secured import EXCHANGE, FOLDER, Desk
from fedsb.config.compose import load
from fedsb.config.schema import Config
from fedsb.core.state import Name, State
from fedsb.federation.certificates import node_key
from fedsb.node.settings import NodeConfig, OwnData, OwnSecure
from fedsb.secure.keys import CONFIRMED, SEALED
from fedsb.secure.party import ADVERTISED, Party
from fedsb.secure.session import ID, SecureError, UnsignedError
from fedsb.wire.messages import Instruction
from fedsb.wire.secured import Secured, bytes_of, joined, parted, words_of

RUN = ["method=fed_sb", "init.kind=orthogonal", "federation.num_clients=4", "federation.secure_sum=true", "federation.exactness=false"]
CONFIG = load(RUN)
FOUR = ("client-0", "client-1", "client-2", "client-3")
THREE = FOUR[:3]
UPLOAD = State({Name("layer", "R"): torch.full((2, 2), 0.001)})


@dataclass
class Clients:
    """Clients that are asked as a server asks them: each message meets a desk that knows what lies on the disk alone."""

    folder: Path
    nodes: dict[str, NodeConfig] = field(default_factory=dict)
    session: bytes = field(default_factory=lambda: secrets.token_bytes(ID))
    number: int = 1
    advertised: dict[str, bytes] = field(default_factory=dict)
    sealed: dict[str, dict[str, bytes]] = field(default_factory=dict)
    confirmed: dict[str, dict[str, bytes]] = field(default_factory=dict)
    make: type[Desk] = Desk
    config: Config = CONFIG
    weights: tuple[float, ...] = (20.0,) * 4
    bound: float = 0.05

    def desk(self, client: str, members: Collection[str] = (), sealed: bytes = b"") -> Desk:
        told = Secured(tuple(sorted(members)), self.weights[: len(members)], self.bound, self.session + sealed)
        instruction = Instruction(client, self.number, origin="f" * 32, secured=told)
        return self.make(self.config, instruction, self.folder / FOLDER / client, self.nodes.get(client))

    def advertise(self) -> None:
        self.advertised = {client: bytes_of(self.desk(client).advertise()) for client in FOUR}

    def give(self, client: str) -> None:
        found = bytes_of(self.desk(client, self.advertised, joined(self.advertised)).give())
        self.sealed[client] = parted(found, [name for name in sorted(self.advertised) if name != client], SEALED)

    def mask(self, client: str, upload: State = UPLOAD) -> State:
        mine = {name: given[client] for name, given in self.sealed.items() if name != client}
        return self.desk(client, self.sealed, joined(mine)).mask(upload, State(), 20)

    def confirm(self, *clients: str) -> None:
        for client in clients:
            found = bytes_of(self.desk(client, clients).confirm())
            self.confirmed[client] = parted(found, [name for name in clients if name != client], CONFIRMED)

    def answer(self, client: str, members: Collection[str]) -> State:
        mine = {name: self.confirmed.get(name, {}).get(client, bytes(CONFIRMED)) for name in members if name != client}
        return self.desk(client, members, joined(mine)).answer()

    def begin(self) -> Clients:
        """Go as far as all four have sent an upload."""
        self.advertise()
        for client in FOUR:
            self.give(client)
        for client in FOUR:
            self.mask(client)
        return self


def test_a_message_that_comes_again_gets_what_it_got(tmp_path: Path) -> None:
    clients = Clients(tmp_path).begin()
    advertised, sealed = dict(clients.advertised), {name: dict(given) for name, given in clients.sealed.items()}
    masked = clients.mask("client-0")
    clients.advertise()
    clients.give("client-0")
    assert (clients.advertised, clients.sealed) == (advertised, sealed)
    assert (words_of(clients.mask("client-0")) == words_of(masked)).all()
    clients.confirm(*FOUR)
    confirmed = dict(clients.confirmed)
    clients.confirm(*FOUR)
    assert clients.confirmed == confirmed
    one = clients.answer("client-0", FOUR)
    assert bytes_of(clients.answer("client-0", FOUR)) == bytes_of(one)


def test_secrets_are_gone_when_the_sum_is_unmasked(tmp_path: Path) -> None:
    clients = Clients(tmp_path).begin()
    kept = tmp_path / FOLDER / "client-0" / EXCHANGE
    before = json.loads(kept.read_text())
    clients.confirm(*FOUR)
    clients.answer("client-0", FOUR)
    text = kept.read_text()
    assert not any(secret in text for secret in before["secrets"].values())
    assert not any(both[64:] in text for both in before["shares"].values())  # of masks with others, of whom none has dropped out
    for ask in (lambda: clients.mask("client-0"), lambda: clients.give("client-0")):
        with pytest.raises(SecureError, match="is unmasked, and nothing is added"):
            ask()


def test_a_sum_over_others_is_refused_also_when_the_round_begins_again(tmp_path: Path) -> None:
    """A server that dies after it has unmasked, and asks the round again without one of them, would have the difference of two sums."""
    clients = Clients(tmp_path).begin()
    clients.confirm(*FOUR)
    clients.answer("client-0", FOUR)
    with pytest.raises(SecureError, match="for another sum of round 1 were given before"):
        clients.answer("client-0", THREE)
    again = Clients(tmp_path).begin()
    assert again.advertised.keys() == clients.advertised.keys()
    assert not {*again.advertised.values()} & {*clients.advertised.values()}
    with pytest.raises(SecureError, match="for another sum of round 1 were given before"):
        again.answer("client-0", THREE)
    again.confirm(*FOUR)
    again.answer("client-0", FOUR)
    later = Clients(tmp_path, number=2).begin()
    later.confirm(*THREE)
    later.answer("client-0", THREE)


def test_what_was_said_of_an_earlier_exchange_is_gone(tmp_path: Path) -> None:
    clients = Clients(tmp_path).begin()
    Clients(tmp_path).advertise()
    for ask in (lambda: clients.mask("client-0"), lambda: clients.answer("client-0", FOUR), lambda: clients.give("client-0")):
        with pytest.raises(SecureError, match="not here; the round must begin again"):
            ask()


def test_too_few_by_what_the_client_knows_of_the_run(tmp_path: Path) -> None:
    """Four clients, of whom a share of 0.3 may go: that is one."""
    clients = Clients(tmp_path).begin()
    with pytest.raises(SecureError, match="2 clients are in the sum, and this one gives its part to no less than 3"):
        clients.confirm(*FOUR[:2])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["federation.names=[client-0,client-1,client-2,x]"], "'client-3' is no client"),
        (["federation.fraction=0.75"], "4 clients are shown"),
    ],
)
def test_clients_that_a_round_cannot_have_are_refused(overrides: list[str], said: str, tmp_path: Path) -> None:
    clients = Clients(tmp_path, config=load([*RUN, *overrides]))
    clients.advertise()
    with pytest.raises(SecureError, match=said):
        clients.give("client-0")


def test_every_message_of_an_exchange_has_the_same_settings(tmp_path: Path) -> None:
    """Those of the first alone would say how many must be in the sum, of which a server could then have that of two."""
    fewer = load([*RUN, "federation.fraction=0.5"])
    clients = Clients(tmp_path, config=fewer)
    clients.advertise()
    clients.config = CONFIG
    with pytest.raises(SecureError, match="other settings of the run than those by which the exchange began"):
        clients.give("client-0")
    honest = Clients(tmp_path).begin()
    honest.config = fewer
    for ask in (lambda: honest.mask("client-0"), lambda: honest.confirm("client-0", "client-1"), lambda: honest.give("client-0")):
        with pytest.raises(SecureError, match="other settings of the run"):
            ask()


def test_clients_of_other_settings_are_in_no_exchange_together(tmp_path: Path) -> None:
    """A server that tells each client settings of its own, all along, gets no shares that any of the others can open."""
    clients = Clients(tmp_path)
    clients.advertise()
    clients.config = load([*RUN, "federation.secure_dropout=0.45"])
    clients.advertised["client-3"] = bytes_of(clients.desk("client-3").advertise())
    clients.give("client-3")
    clients.config = CONFIG
    for client in THREE:
        clients.give(client)
    with pytest.raises(SecureError, match="sealed for 'client-0' is not of 'client-3'"):
        clients.mask("client-0")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_sent(tmp_path: Path, value: float) -> None:
    clients = Clients(tmp_path)
    clients.advertise()
    for client in FOUR:
        clients.give(client)
    with pytest.raises(SecureError, match="R of 'layer' holds NaN or infinity"):
        clients.mask("client-0", State({Name("layer", "R"): torch.tensor([[0.0, value]])}))


def test_secrets_lie_where_others_cannot_read(tmp_path: Path) -> None:
    Clients(tmp_path).begin()
    assert (tmp_path / FOLDER / "client-0").stat().st_mode & 0o077 == 0


def test_a_run_without_secure_sums_has_no_part_in_one(tmp_path: Path) -> None:
    config = load(["method=fed_sb", "init.kind=orthogonal"])
    with pytest.raises(SecureError, match="this run has none"):
        Desk(config, Instruction("client-0", 1, secured=Secured()), tmp_path, None)
    with pytest.raises(SecureError, match="without masks"):
        Desk(CONFIG, Instruction("client-0", 1), tmp_path, None)


@pytest.mark.parametrize("forged", ["", "signed by another", "not signed"])
def test_a_node_holds_the_others_keys_against_its_list(tmp_path: Path, forged: str) -> None:
    for name in FOUR:
        node_key(tmp_path / name)
    peers = tmp_path / "peers"
    peers.write_text("".join(f"{name} {(tmp_path / f'{name}.pub').read_text()}" for name in FOUR))

    def node(name: str, key: str | None) -> NodeConfig:
        return NodeConfig(name, OwnData("package"), secure=OwnSecure(key=key, peers=str(peers)))

    nodes = {name: node(name, str(tmp_path / name)) for name in FOUR}
    nodes["client-3"] = node("client-3", {"": str(tmp_path / "client-3"), "not signed": None}.get(forged, str(tmp_path / "client-2")))
    clients = Clients(tmp_path, nodes)
    clients.advertise()
    assert {len(said) for said in clients.advertised.values()} == {ADVERTISED}
    if not forged:
        clients.give("client-0")
        return
    with pytest.raises(UnsignedError, match="the keys of 'client-3' are"):
        clients.give("client-0")


class SlowDesk(Desk):
    """A desk that waits, before it keeps anything, for another one that has read as much; without success where that one must wait."""

    both = threading.Barrier(2)

    def _keep(self, party: Party) -> None:
        with suppress(threading.BrokenBarrierError):
            self.both.wait(0.3)
        super()._keep(party)


@pytest.mark.parametrize("step", ["give", "mask", "confirm"])
def test_of_two_messages_at_once_one_finds_what_the_other_has_kept(step: str, tmp_path: Path) -> None:
    """Else shares of two kinds go out under one key of a cipher, two uploads under one mask, or two lists are confirmed."""
    clients = Clients(tmp_path, make=SlowDesk)
    clients.advertise()
    if step != "give":
        for client in FOUR:
            clients.give(client)
    if step == "confirm":
        for client in FOUR:
            clients.mask(client)
    shown = clients.advertised
    three = {name: shown[name] for name in THREE}
    other = State({Name("layer", "R"): torch.full((2, 2), 0.002)})
    asked: dict[str, list[Callable[[], object]]] = {
        "give": [lambda given=given: clients.desk("client-0", given, joined(given)).give() for given in (shown, three)],  # type: ignore[misc]
        "mask": [lambda upload=upload: clients.mask("client-0", upload) for upload in (UPLOAD, other)],  # type: ignore[misc]
        "confirm": [lambda names=names: clients.desk("client-0", names).confirm() for names in (FOUR, THREE)],  # type: ignore[misc]
    }
    SlowDesk.both.reset()
    with ThreadPoolExecutor(2) as threads:
        failed = [found.exception() for found in [threads.submit(ask) for ask in asked[step]]]
    assert sorted(isinstance(error, SecureError) for error in failed) == [False, True]
    assert re.search("than before|another upload|other clients were confirmed", str(next(filter(None, failed))))
