"""A wire of int8 with error feedback, held against sums in float64: what travelled adds up to what was meant, on both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message
from safetensors.torch import load_file
from torch import Tensor

from fedsb.app.asked import config_of as client_config
from fedsb.app.assembly import model_of
from fedsb.client_app import app as client_app
from fedsb.core.errors import UserError
from fedsb.core.state import Layout, Name, State
from fedsb.cost.table import cost_of
from fedsb.wire.messages import decode_instruction
from strategies.methods.fedex_lora import FedExLoRA
from tests.strategies.federations import Exchange, Federation, classification, federate, start_of
from tests.strategies.methods.test_fedex_lora import fedex

ROUNDS = ("federation.num_rounds=5", "federation.fraction=0.6", "train.lr=0.02", "adapter.alpha=5", "federation.wire_dtype=int8")
RUNS = {
    "means": ("method=fedavg_lora",),
    "in turns": ("method=rolora",),
    "several ranks": ("method=nested_fed_sb", "federation.ranks=[1,2,3]"),
}
TWICE = 4  # a round in which everybody is asked twice
Sums = dict[Name, Tensor]


class Watched:
    """The ClientApp, with what each client trained, and what it kept and said each time that it was asked."""

    def __init__(self, folder: Path) -> None:
        self.trained: dict[tuple[str, int], State] = {}
        self.repeated: list[tuple[object, object]] = []
        self._folder = folder

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type != "train":
            return client_app(message, context)
        told = decode_instruction(message.content)
        reply = client_app(message, context)
        if told.round == TWICE:
            first = self._said(reply)
            reply = client_app(message, context)
            self.repeated.append((first, self._said(reply)))
        model = model_of(client_config(str(context.run_config["overrides"])), told.labels)
        self.trained[told.client, told.round] = model.spec.fold(model.trained())
        return reply

    def _said(self, reply: Message) -> object:
        files = {str(path): path.read_bytes() for path in self._folder.rglob("left/**/*.safetensors")}
        return {key: array.data for key, array in reply.content["arrays"].items()}, files  # type: ignore[union-attr]

    def left(self, client: str) -> State:
        """Return what a client has kept last."""
        latest = max(path for path in self._folder.rglob("left/*/round-*.safetensors") if path.parent.name.startswith(client))
        return State({Name(*reversed(key.split("|", 1))): t for key, t in load_file(latest).items()})


Ran = tuple[Federation, Watched]


@pytest.fixture(scope="module", params=RUNS)
def ran(request: pytest.FixtureRequest, tiny_bert: Path, tiny_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder, chosen = tmp_path_factory.mktemp("int8"), RUNS[request.param]
    watched = Watched(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSB_HOME", str(folder / "home"))
        start = start_of(chosen[0].removeprefix("method="))
        return federate([*classification(tiny_bert, tiny_csv), *chosen, start, *ROUNDS, f"output={folder}/run"], app=watched), watched


def layouts(federation: Federation, exchange: Exchange) -> tuple[Layout, Layout]:
    """Return what went down to a client and came up from it."""
    one = federation.prepared.strategy.layouts_of(exchange.instruction.client)
    return one.down, one.up_in(exchange.instruction.round)


def test_a_client_has_said_all_that_it_meant_but_for_what_it_keeps(ran: Ran) -> None:
    """Of every value the sum of what was decoded is the sum of all changes less what is on the client's disk, whatever rounds it missed."""
    federation, watched = ran
    meant: dict[str, Sums] = {}
    for number, exchanges in federation.grid.rounds().items():
        basis = federation.kept.bases[number - 1]
        for exchange in exchanges:
            down, up = layouts(federation, exchange)
            client, sight = exchange.instruction.client, federation.prepared.strategy.sight_of(exchange.instruction.client)
            begun = sight.state(basis).merge(exchange.instruction.state(down))
            trained, sums = watched.trained[client, number], meant.setdefault(client, {})
            for name, said in exchange.answer.state(up).items():
                sums[name] = sums.get(name, 0) + trained[name].double() - begun[name].double() - said.double()
    assert len(meant) == 5
    for client, sums in meant.items():
        left = watched.left(client)
        assert left.keys() == sums.keys()
        for name, t in sums.items():
            torch.testing.assert_close(t, left[name].double(), rtol=0, atol=1e-6)
            assert t.any()


def test_the_server_has_added_all_that_came_and_clients_hold_it_but_for_one_rounding(ran: Ran) -> None:
    """``sent + left`` is the first state and every mean of differences, entry by entry over those who hold the entry."""
    federation, _ = ran
    strategy, first = federation.prepared.strategy, federation.kept.states[0]
    whole = {name: t.double() for name, t in federation.kept.bases[0].merge(first).items()}
    for exchanges in federation.grid.rounds().values():
        sums, shares = {}, {}
        for exchange in exchanges:
            weight = exchange.answer.num_examples
            for name, said in exchange.answer.state(layouts(federation, exchange)[1]).items():
                place = tuple(map(slice, said.shape))
                for total, value in ((sums, said.double()), (shares, torch.ones_like(said).double())):
                    total.setdefault(name, torch.zeros_like(whole[name]))[place] += weight * value
        for name, total in sums.items():
            whole[name] += torch.where(shares[name] > 0, total / shares[name], 0)
    sent = federation.kept.states[-1]
    for name, t in sent.items():
        left = strategy.sending.left[name]
        torch.testing.assert_close(t.double() + left.double(), whole[name], rtol=1e-5, atol=1e-6)
        assert float(left.abs().max()) <= float(whole[name].abs().max()) / 253
    for name, t in federation.kept.bases[-1].items():  # the log is float32
        torch.testing.assert_close(t.double(), whole[name], rtol=1e-5, atol=1e-6)


def test_a_repeated_request_has_the_same_bytes_and_leaves_out_what_it_left(ran: Ran) -> None:
    repeated = ran[1].repeated
    assert len(repeated) == 3
    assert all(first == second for first, second in repeated)


def test_several_ranks_move_what_their_cost_foretells(ran: Ran) -> None:
    cost = cost_of(ran[0].config)
    assert ran[0].payload() == (cost.payload_up, cost.payload_down, cost.payload_one_off)


def test_without_feedback_nobody_keeps_anything(tiny_bert: Path, tiny_csv: Path, tmp_path: Path) -> None:
    overrides = [
        *classification(tiny_bert, tiny_csv),
        "method=fedavg_lora",
        *ROUNDS,
        "federation.error_feedback=false",
        f"output={tmp_path}",
    ]
    federation = federate([*overrides, "federation.num_rounds=2"])
    assert not len(federation.prepared.strategy.sending.left)
    assert not list(tmp_path.rglob("left"))
    assert {(e.instruction.own, e.instruction.carried) for e in federation.grid.exchanges} == {(0, ())}


def test_fedex_truncated_to_less_than_the_rounding_takes_is_refused() -> None:
    up = Layout(((Name("x", "A"), (4, 9)), (Name("x", "B"), (9, 4))))
    with pytest.raises(
        UserError, match=r"^method\.options\.truncate=7 with federation\.wire_dtype=int8: [^\n]+; use 8 or more, null [^\n]+$"
    ):
        fedex(wire_dtype="int8", truncate=7, up=up)
    for dtype, rank in (("int8", 8), ("int8", None), ("bfloat16", 7)):
        assert isinstance(fedex(wire_dtype=dtype, truncate=rank, up=up), FedExLoRA)
