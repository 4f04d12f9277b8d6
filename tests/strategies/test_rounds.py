"""Laws of whole rounds: real messages over an in-process grid, answered by the real ClientApp with tiny models."""

from __future__ import annotations

import io
import os
import random
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor

from fedsb.adapters import SPECS
from fedsb.app.asked import config_of as client_config
from fedsb.app.assembly import model_of
from fedsb.app.client_job import _store
from fedsb.client_app import app as client_app
from fedsb.config.compose import load
from fedsb.core.errors import RunError
from fedsb.core.state import HEAD, Name, State
from fedsb.cost.table import cost_of
from fedsb.report.series import final_metrics
from fedsb.wire.frozen import ROOT
from fedsb.wire.messages import decode_instruction, encode_missing
from strategies import STRATEGIES, LowRankStrategy
from strategies.rounds import RoundState
from tests.strategies.federations import (
    ASKED,
    ClientCall,
    Dense,
    Exchange,
    Federation,
    KeepingGrid,
    classification,
    federate,
    language_model,
    mean_update,
    named,
    next_instructions,
    product,
    split_nodes,
    start_of,
)

# alpha / r = 5 / 3, neither 1 nor a power of two; three of five clients a round, of unequal size.
ROUNDS = ["federation.num_rounds=4", "federation.fraction=0.6", "adapter.alpha=5", "train.lr=0.02"]
METHODS = {name: [f"method={name}", start_of(name)] for name in STRATEGIES if name != "head_only"}


def logs(method: str) -> bool:
    """Tell whether a method has anything in the log."""
    grows = STRATEGIES[method].residual_rank is not LowRankStrategy.residual_rank
    return grows or bool(SPECS[load([f"method={method}"]).method.adapter].in_log)


LOGGED = [method for method in METHODS if logs(method)]
WHOLE = [method for method in METHODS if SPECS[load([f"method={method}"]).method.adapter].has_global_model]
MODELS = ("tiny_bert", "tiny_gpt2", "tiny_llama")
Options = Callable[..., list[str]]


@pytest.fixture(scope="session")
def options(request: pytest.FixtureRequest, tiny_csv: Path) -> Options:
    """Return the overrides of a federation: a model, a method, and more."""

    def make(model: str = "tiny_bert", method: str = "fed_sb", *more: str) -> list[str]:
        task = classification if model == "tiny_bert" else language_model
        return [*METHODS[method], *task(request.getfixturevalue(model), tiny_csv), *ROUNDS, *more]

    return make


@pytest.fixture(scope="session")
def plain(options: Options, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Federation]:
    """Run a federation of a model by a method as :func:`options` gives it, once a session."""

    @cache
    def run(model: str, method: str) -> Federation:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FEDSB_HOME", str(tmp_path_factory.mktemp("home")))
            return federate(options(model, method))

    return run


Plain = Callable[[str, str], Federation]


def relative(difference: Dense, reference: Dense) -> float:
    """Return ``‖difference‖ / ‖reference‖`` over all modules."""
    return float(torch.stack([t.norm() for t in difference.values()]).norm() / torch.stack([t.norm() for t in reference.values()]).norm())


def minus(left: Dense, right: Dense) -> Dense:
    return {module: t - right[module] for module, t in left.items()}


def plus(left: Dense, right: Dense) -> Dense:
    return {module: t + right[module] for module, t in left.items()}


def pristine(federation: Federation) -> Dense:
    return {module: w.double() for module, w in federation.fresh_model().weights().items()}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_a_client_holds_the_mean_of_what_was_trained(plain: Plain, model: str, method: str, tmp_path: Path) -> None:
    """Where a method claims so; elsewhere it is off after the first round, or there is no such weight."""
    federation = plain(model, method)
    if not federation.prepared.strategy.is_exact:
        assert_off(federation, tmp_path)
        return
    shapes = federation.prepared.adapted.shapes.values()
    assert any(m != n for m, n in shapes)
    base = pristine(federation)  # W0 and, for a method with a residual, what earlier rounds added to it
    checked = 0
    for exchanges, during, after in next_instructions(federation, tmp_path):
        assert len(exchanges) == 3
        assert len({e.answer.num_examples for e in exchanges}) == 3
        update, head = mean_update(federation, exchanges, during.basis.merge(during.state))
        wanted = plus(base, update)
        for held in after:
            assert relative(minus(held.weights, wanted), wanted) <= 1e-6
            moved = plus(product(federation, held.state, held.basis), {m: held.residuals.get(m, torch.zeros(())) for m in base})
            change = minus(wanted, pristine(federation))
            assert relative(minus(moved, change), update) <= 1e-5
            assert all(torch.allclose(held.head[name].double(), t, rtol=1e-6, atol=1e-7) for name, t in head.items())
            checked += 1
        base = minus(wanted, product(federation, after[0].state, after[0].basis))
    assert checked == 9  # three clients after each of rounds 1 to 3
    assert all(record.exactness_gap < 1e-5 for record in federation.records[1:])


def assert_off(federation: Federation, folder: Path) -> None:
    """Hold that a method which claims no exactness has none to claim."""
    if not federation.prepared.strategy.has_global_model:
        assert all(record.exactness_gap is None for record in federation.records)
        return
    exchanges, during, after = next(next_instructions(federation, folder))
    update, _ = mean_update(federation, exchanges, during.basis.merge(during.state))
    wanted = plus(pristine(federation), update)
    assert relative(minus(after[0].weights, wanted), update) > 1e-3


def test_the_largest_client_is_asked_first(options: Options) -> None:
    """In the start as in every round: what takes longest must not begin last. Ties go by name."""
    start = ("init.kind=gradient", "init.num_examples=2", "federation.fraction=1.0", "federation.num_rounds=2")
    federation = federate(options("tiny_bert", "fed_sb", *start, "federation.partition.sizes=[2,5,3,5,4]"))
    order = [("client-1", 23), ("client-3", 23), ("client-4", 18), ("client-2", 13), ("client-0", 9)]
    asked = [(exchange.instruction.client, exchange.answer.num_examples) for exchange in federation.grid.exchanges]
    pushes = len(asked) // len(order)
    assert {exchange.kind for exchange in federation.grid.exchanges} >= {"train", "train.evidence"}
    assert asked == order * pushes
    assert pushes > 3


def closed_form(federation: Federation, exchanges: list[Exchange]) -> float:
    """Return ``‖s Σ w_i (B_i − B̄)(A_i − Ā)‖ / ‖(s Σ w_i B_i A_i, head − first head)‖`` in float64; the head is averaged exactly."""
    layout, scale = federation.prepared.adapted.layouts.down, federation.prepared.adapted.scale
    uploads = [e.answer.state(layout) for e in exchanges]
    weights = torch.tensor([e.answer.num_examples for e in exchanges]).double()
    weights /= weights.sum()
    missed: list[Tensor] = []
    for module in federation.prepared.adapted.shapes:
        lefts, rights = (torch.stack([u[Name(module, role)].double() for u in uploads]) for role in ("B", "A"))
        left, right = (torch.einsum("i,ijk->jk", weights, stack) for stack in (lefts, rights))
        missed.append(scale * torch.einsum("i,ijr,irk->jk", weights, lefts - left, rights - right))
    update, head = mean_update(federation, exchanges, State())
    first = federation.prepared.initial.pick(HEAD)
    moved = [*update.values(), *(t - first[name].double() for name, t in head.items())]
    return float(torch.stack([t.norm() for t in missed]).norm() / torch.stack([t.norm() for t in moved]).norm())


@pytest.mark.parametrize("model", MODELS)
def test_the_gap_of_plain_averaging_is_its_closed_form(plain: Plain, model: str) -> None:
    federation = plain(model, "fedavg_lora")
    for number, exchanges in federation.grid.rounds().items():
        gap = federation.records[number].exactness_gap
        assert gap > 1e-3
        assert gap == pytest.approx(closed_form(federation, exchanges), rel=1e-4)


def scrambled(seed: int) -> Callable[[ClientCall, dict[str, Any]], KeepingGrid]:
    """Return a maker of grids whose replies are late and come in a random order."""
    return lambda app, run_config: LateGrid(app, run_config, {i + 1: {"partition-id": i, "num-partitions": 3} for i in range(3)}, seed)


class LateGrid(KeepingGrid):
    """Answers everything at once, and hands the replies out later: none, one or several at a time, in a random order."""

    def __init__(self, app: ClientCall, run_config: dict[str, Any], nodes: dict[int, dict[str, Any]], seed: int) -> None:
        super().__init__(app, run_config, nodes)
        self._draw = random.Random(seed)
        self._waiting: list[Message] = []
        self.handed: list[Message] = []

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        wanted = list(message_ids)
        while replies := super().pull_messages(wanted):
            self._waiting += replies
        self._draw.shuffle(self._waiting)
        count = self._draw.randint(0, len(self._waiting))
        handed, self._waiting = self._waiting[:count], self._waiting[count:]
        self.handed += handed
        return handed


@pytest.mark.parametrize("method", METHODS)
def test_neither_arrival_nor_nodes_nor_an_earlier_run_change_a_bit(options: Options, plain: Plain, method: str) -> None:
    """One node in order; then, in the process and the model of that run, three nodes whose replies come late and shuffled."""
    in_order, late = plain("tiny_bert", method), federate(options("tiny_bert", method), grid=scrambled(seed=1))
    assert late.sha256 == in_order.sha256
    assert {e.node for e in late.grid.exchanges} == {1, 2, 3}
    assert isinstance(late.grid, LateGrid)
    assert late.grid.handed != [e.reply for e in late.grid.exchanges]
    assert [r.clients for r in late.records] == [r.clients for r in in_order.records]
    assert [r.metrics for r in late.records] == [r.metrics for r in in_order.records]


def test_dropout_and_another_seed_change_the_bits(options: Options, plain: Plain) -> None:
    dropout, seed = (federate(options("tiny_bert", "fed_sb", *more)) for more in (["adapter.dropout=0.1"], ["seed=1"]))
    assert len({plain("tiny_bert", "fed_sb").sha256, dropout.sha256, seed.sha256}) == 3


def test_a_gradient_start_does_not_see_an_earlier_run_in_its_process(options: Options) -> None:
    overrides = options("tiny_bert", "fed_sb", "init.kind=gradient", "init.num_examples=8", "federation.num_rounds=1")
    assert federate(overrides).sha256 == federate(overrides).sha256


FEWER = "federation.min_replies=1"  # on real nodes all must be there, unless fewer are asked for


class ClubGrid(KeepingGrid):
    """One node a client, named by its operator; ``absent`` nodes are not online before a round."""

    def __init__(self, app: ClientCall, run_config: dict[str, Any], absent: dict[int, int], folder: Path) -> None:
        super().__init__(app, run_config, split_nodes(folder, shlex.split(run_config["overrides"]), 5))
        self._absent = absent

    def get_node_ids(self) -> list[int]:
        coming = max(self.rounds(), default=0) + 1
        return [node for node in super().get_node_ids() if coming >= self._absent.get(node, 0)]


def in_own_homes(folder: Path, lost: Callable[[str, int], bool]) -> ClientCall:
    """Return a ClientApp that works for each client as a process of its own, with a cache of its own that may get lost."""

    def call(message: Message, context: Context) -> Message:
        if message.metadata.message_type.startswith("query."):
            return client_app(message, context)
        instruction = decode_instruction(message.content)
        home = folder / instruction.client
        if lost(instruction.client, instruction.round):
            shutil.rmtree(home, ignore_errors=True)
        os.environ["FEDSB_HOME"] = str(home)
        _store.cache_clear()
        return client_app(message, context)

    return call


@pytest.mark.parametrize("method", LOGGED)
def test_a_client_that_joins_late_holds_the_same_weights(options: Options, method: str, tmp_path: Path) -> None:
    """client-4 is not there before round 3."""
    overrides = options("tiny_bert", method, "federation.fraction=1.0", FEWER)
    app = in_own_homes(tmp_path / "homes", lambda client, number: False)
    late = federate(overrides, grid=lambda a, c: ClubGrid(a, c, {5: 3}, tmp_path / "data"), app=app)
    assert [r.failed for r in late.records[1:]] == [{"client-4": "not connected"}] * 2 + [{}, {}]
    rounds = late.grid.rounds()
    bundle = next(e for e in rounds[3] if e.instruction.client == "client-4").instruction.bundle
    assert bundle is not None
    assert bundle.parent == ROOT
    assert rounds[3][0].instruction.frozen == bundle.head
    for _, _, after in next_instructions(late, tmp_path / "check"):
        assert all(torch.equal(held.weights[m], after[0].weights[m]) for held in after for m in held.weights)


@pytest.mark.parametrize("method", LOGGED)
def test_a_lost_cache_costs_bytes_and_nothing_else(options: Options, method: str, tmp_path: Path) -> None:
    overrides = options("tiny_bert", method, "federation.fraction=1.0", "federation.num_rounds=3", "train.local_steps=1")
    club = partial(ClubGrid, absent={}, folder=tmp_path / "data")
    kept = federate(overrides, grid=club, app=in_own_homes(tmp_path / "kept", lambda client, number: False))
    lost = federate(overrides, grid=club, app=in_own_homes(tmp_path / "lost", lambda client, n: (client, n) == ("client-1", 3)))
    assert kept.sha256 == lost.sha256
    again = [e for e in lost.grid.rounds()[3] if e.instruction.client == "client-1"]
    assert not lost.records[3].failed
    given = again[0].instruction.bundle
    if given is not None and given.parent == ROOT:  # all that it had held is superseded: nothing is missed
        assert [e.answer.missing for e in again] == [False]
        assert lost.payload() == kept.payload()
        return
    assert [e.answer.missing for e in again] == [True, False]
    # The first request is paid for, and the second with the whole log; what held the basis is one-off, the rest goes down.
    bundle = again[1].instruction.bundle
    assert bundle is not None
    versions = {name: (name.role.split("@")[0], int(name.role.split("@")[1])) for name in bundle.state}
    first = lost.frozen.first
    once = sum(t.numel() for name, t in bundle.state.items() if first.get(Name(name.module, versions[name][0])) == versions[name][1])
    trained = 4 * lost.prepared.adapted.layouts.down.numel
    assert lost.records[3].payload_down - kept.records[3].payload_down == trained + 4 * (bundle.state.numel - once)
    assert lost.records[3].payload_one_off - kept.records[3].payload_one_off == 4 * once
    assert lost.records[3].payload_up == kept.records[3].payload_up
    assert lost.payload()[0] == kept.payload()[0]


Tamper = Callable[[RecordDict], RecordDict]


def tampering(client: str, tampers: Sequence[Tamper]) -> ClientCall:
    """Return the ClientApp with the replies of one client changed on their way out, by one function a round."""

    def call(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type != "train":
            return reply
        instruction = decode_instruction(message.content)
        if instruction.client != client or instruction.round > len(tampers):
            return reply
        return Message(tampers[instruction.round - 1](reply.content), reply_to=message)

    return call


def with_arrays(content: RecordDict, change: Callable[[Any], Any], key: str = "trained") -> RecordDict:
    arrays = dict(content.array_records["arrays"])
    arrays[key] = Array(change(arrays[key].numpy().copy()))
    return RecordDict({"arrays": ArrayRecord(arrays), "metrics": content.metric_records["metrics"]})


def with_metrics(content: RecordDict, **changes: Any) -> RecordDict:
    metrics = MetricRecord({**content.metric_records["metrics"], **changes})
    return RecordDict({"arrays": content.array_records["arrays"], "metrics": metrics})


def poisoned(values: Any, with_what: float) -> Any:
    values[3] = with_what
    return values


def with_data(content: RecordDict, data: bytes) -> RecordDict:
    array = content.array_records["arrays"]["trained"]
    damaged = Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=data)
    return RecordDict({**content, "arrays": ArrayRecord({**content.array_records["arrays"], "trained": damaged})})


def with_header(content: RecordDict, **header: Any) -> RecordDict:
    """Let an array's header lie as only Flower's inflatable objects can: they read it from JSON."""
    for name, value in header.items():
        setattr(content.array_records["arrays"]["trained"], name, value)
    return content


def archive() -> bytes:
    sink = io.BytesIO()
    np.savez(sink, np.zeros(3, np.float32))
    return sink.getvalue()


def npy_header(shape: tuple[int, ...]) -> bytes:
    sink = io.BytesIO()
    np.lib.format.write_array_header_1_0(sink, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return sink.getvalue()


def without(content: RecordDict, name: str) -> RecordDict:
    return RecordDict({key: record for key, record in content.items() if key != name})


def of_another_type(content: RecordDict) -> RecordDict:
    array = content.array_records["arrays"]["trained"]
    strange = Array(dtype="strange", shape=array.shape, stype=array.stype, data=array.data)
    return RecordDict({**content, "arrays": ArrayRecord({**content.array_records["arrays"], "trained": strange})})


def renamed(content: RecordDict, old: str, new: str) -> RecordDict:
    arrays = {new if key == old else key: array for key, array in content.array_records["arrays"].items()}
    return RecordDict({**content, "arrays": ArrayRecord(arrays)})


BROKEN: dict[str, tuple[Tamper, str]] = {
    "nan": (lambda c: with_arrays(c, lambda v: poisoned(v, float("nan"))), r"R of '.*encoder\.layer\.0.*' holds NaN or infinity"),
    "infinity": (lambda c: with_arrays(c, lambda v: poisoned(v, float("inf")), "head"), r"head of 'classifier\..*' holds NaN or infinity"),
    "too few values": (lambda c: with_arrays(c, lambda v: v[:-1]), r"group 'trained' holds \d+ values, expected \d+"),
    "another layout": (
        lambda c: with_metrics(c, layout=12345),
        r"layout 000000003039 .* shapes than R of 'bert.* to .*; model",
    ),
    "no arrays": (lambda c: without(c, "arrays"), r"groups are \[\], expected \['head', 'trained'\]"),
    "no metrics": (lambda c: without(c, "metrics"), r"a reply needs a MetricRecord 'metrics' with 'num-examples'; it holds \['arrays'\]"),
    "metrics of another kind": (lambda c: RecordDict({**c, "metrics": ConfigRecord({"num-examples": 3})}), "a reply needs a MetricRecord"),
    "no examples": (lambda c: with_metrics(c, **{"num-examples": 0}), "num-examples is 0, expected at least 1"),
    "negative examples": (lambda c: with_metrics(c, **{"num-examples": -3}), "num-examples is -3, expected at least 1"),
    "a list of examples": (lambda c: with_metrics(c, **{"num-examples": [1, 2]}), "num-examples"),
    "nan examples": (lambda c: with_metrics(c, **{"num-examples": float("nan")}), "num-examples"),
    "infinite examples": (lambda c: with_metrics(c, **{"num-examples": float("inf")}), "num-examples"),
    "a nan loss": (lambda c: with_metrics(c, loss=float("nan")), "loss is nan"),
    "a nan of the wire": (lambda c: with_metrics(c, **{"encoding-error": float("nan")}), "encoding-error is nan"),
    "a list of losses": (lambda c: with_metrics(c, loss=[0.1, 0.2]), "loss"),
    "a group renamed": (lambda c: renamed(c, "head", "tail"), r"groups are \['tail', 'trained'\], expected \['head', 'trained'\]"),
    "an unknown dtype of the wire": (
        lambda c: renamed(c, "head", "head:int3"),
        r"array 'head:int3' .* not of a wire dtype \(float32, bfloat16\)",
    ),
    "an unknown dtype of the array": (of_another_type, r"array 'trained' \(strange \[\d+\]\) is not of a wire dtype"),
    "a row": (lambda c: with_arrays(c, lambda v: v[None]), r"array 'trained' \(float32 \[1, \d+\]\) is not of a wire dtype .*, flat"),
    "a table": (lambda c: with_arrays(c, lambda v: v.reshape(2, -1)), r"array 'trained' \(float32 \[2, \d+\]\) is not .*, flat"),
    "an archive": (lambda c: with_data(c, archive()), "group 'trained' cannot be read: it is an archive"),
    "a broken archive": (lambda c: with_data(c, b"PK\x03\x04 and no more"), "group 'trained' cannot be read"),
    "a header beyond all memory": (lambda c: with_data(c, npy_header((10**15,))), "group 'trained' cannot be read"),
    "nothing behind the header": (lambda c: with_data(c, npy_header((8,))), "group 'trained' cannot be read"),
    "a shape beyond protobuf": (lambda c: with_header(c, shape=(2**31,)), r"array 'trained' \(float32 \[2147483648\]\) is not"),
    "a negative shape": (lambda c: with_header(c, shape=(-3,)), r"array 'trained' \(float32 \[-3\]\) is not"),
    "a nested shape": (lambda c: with_header(c, shape=([3],)), "group 'trained' cannot be read"),
    "no shape": (lambda c: with_header(c, shape=None), "group 'trained' cannot be read"),
    "a shape that is a number": (lambda c: with_header(c, shape=3), "group 'trained' cannot be read"),
    "a dtype that is a list": (lambda c: with_header(c, dtype=["float32"]), "group 'trained' cannot be read"),
    "a dtype that is a number": (lambda c: with_header(c, dtype=3), "group 'trained' cannot be read|is not of a wire dtype"),
    "a format that is a list": (lambda c: with_header(c, stype=["numpy.ndarray"]), "group 'trained' cannot be read"),
    "doubles": (lambda c: with_arrays(c, lambda v: v.astype("float64")), r"array 'trained' \(float64 .* not of a wire dtype"),
}


@pytest.fixture(scope="module")
def battered(options: Options, tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """A federation in which client-1 sends a broken reply of the next kind each round, and a good one at last."""
    rounds = len(BROKEN) + 1
    more = ["federation.fraction=1.0", f"federation.num_rounds={rounds}", "train.local_steps=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSB_HOME", str(tmp_path_factory.mktemp("home")))
        return federate(options("tiny_bert", "fed_sb", *more), app=tampering("client-1", [tamper for tamper, _ in BROKEN.values()]))


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_reply_is_dropped_and_named(battered: Federation, case: str) -> None:
    record = battered.records[list(BROKEN).index(case) + 1]
    assert set(record.failed) == {"client-1"}
    assert re.search(BROKEN[case][1], record.failed["client-1"])
    assert set(record.clients) == {"client-0", "client-2", "client-3", "client-4"}


def test_a_client_whose_replies_were_broken_counts_again_when_they_are_not(battered: Federation) -> None:
    assert not battered.records[-1].failed
    assert len(battered.records[-1].clients) == 5


def test_a_client_that_can_keep_nothing_is_not_asked_for_ever(options: Options) -> None:
    def call(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and decode_instruction(message.content).client == "client-1":
            return Message(encode_missing(), reply_to=message)
        return client_app(message, context)

    federation = federate(options("tiny_bert", "fed_sb", "federation.fraction=1.0", "federation.num_rounds=1"), app=call)
    assert federation.records[1].failed == {"client-1": "lacks frozen state although it was sent all of it"}
    assert [e.instruction.client for e in federation.grid.rounds()[1]].count("client-1") == 2


def test_a_node_that_describes_itself_badly_is_left_out(options: Options, tiny_csv: Path) -> None:
    def call(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "query.describe" and context.node_id == 2:
            return Message(RecordDict({"config": ConfigRecord({"client": "client-1"})}), reply_to=message)
        return client_app(message, context)

    own = {"data-path": str(tiny_csv)}
    nodes = {1: named("client-0", **own), 2: named("client-1", **own)}
    overrides = options("tiny_bert", "fed_sb", "federation.fraction=1.0", "federation.num_rounds=1", "train.local_steps=1", FEWER)
    federation = federate(overrides, grid=lambda app, config: KeepingGrid(app, config, nodes), app=call)
    assert federation.records[1].clients == ("client-0",)
    assert federation.records[1].failed["client-1"] == "not connected"


def test_a_node_that_fails_to_describe_itself_is_asked_again(options: Options) -> None:
    asked: list[int] = []

    def call(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "query.describe":
            asked.append(context.node_id)
            if len(asked) == 1:
                raise OSError("the disk is busy")
        return client_app(message, context)

    more = ("federation.fraction=1.0", "federation.num_rounds=1", "train.local_steps=1", "federation.wait=5")
    federation = federate(options("tiny_bert", "fed_sb", *more), app=call, grid=asked_grid)
    assert len(asked) == 2
    assert not federation.records[1].failed


def test_a_node_that_never_describes_itself_is_said_to_be_there(options: Options) -> None:
    def call(message: Message, context: Context) -> Message:
        raise OSError("the disk is busy")

    overrides = options("tiny_bert", "fed_sb", "federation.num_rounds=1", "train.local_steps=1")
    with pytest.raises(RunError, match=r"0 of 5 clients are connected.*; node 1 is connected and fails to .*: the disk is busy$"):
        federate(overrides, app=call, grid=asked_grid)


def asked_grid(app: ClientCall, config: dict[str, Any]) -> KeepingGrid:
    return KeepingGrid(app, config, ASKED)


def test_a_simulated_node_is_not_asked_for_what_the_server_deals_out(options: Options) -> None:
    seen: list[str] = []

    def call(message: Message, context: Context) -> Message:
        seen.append(message.metadata.message_type)
        return client_app(message, context)

    overrides = options("tiny_bert", "fed_sb", "federation.num_rounds=1", "train.local_steps=1", "data.client_test_fraction=0.2")
    known, asked = federate(overrides, app=call), federate(overrides, grid=asked_grid)
    assert "query.describe" not in seen
    assert known.prepared.strategy.counts == asked.prepared.strategy.counts
    assert sum(known.prepared.strategy.counts.values()) > 0


def test_a_data_path_without_a_client_is_refused(options: Options) -> None:
    """The node would train on the app's data, not on the operator's."""
    overrides = options("tiny_bert", "fed_sb", "federation.num_rounds=1", "train.local_steps=1")
    with pytest.raises(RunError, match="0 of 5 clients are connected"):
        federate(overrides, grid=lambda app, config: KeepingGrid(app, config, {1: {"data-path": "/data/mine"}}))


def test_clients_own_metrics_are_averaged_over_those_that_have_them() -> None:
    state = RoundState(1)
    state.client_metrics = {"a": {"loss": 1.0, "own": 7.0}, "b": {"loss": 4.0}}
    assert state.client_mean({"a": 1, "b": 2}) == {"loss": 3.0, "own": 7.0}


def raising(number: int, *clients: str) -> ClientCall:
    """Return the ClientApp with some clients that fail in one round."""

    def call(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            instruction = decode_instruction(message.content)
            if instruction.round == number and instruction.client in clients:
                raise OSError("no space left on the device of this client")
        return client_app(message, context)

    return call


def test_the_round_goes_on_without_a_client_that_raises(options: Options, tmp_path: Path) -> None:
    """The mean is over those who answered, and their weights sum to one."""
    overrides = options("tiny_bert", "fedex_lora", "federation.fraction=1.0", "federation.num_rounds=2")
    federation = federate(overrides, app=raising(1, "client-0", "client-3"))
    failed = federation.records[1].failed
    assert set(failed) == {"client-0", "client-3"}
    assert all("no space left on the device of this client" in reason for reason in failed.values())
    exchanges, during, after = next(next_instructions(federation, tmp_path))
    update, _ = mean_update(federation, exchanges, during.basis.merge(during.state))
    wanted = plus(pristine(federation), update)
    assert all(relative(minus(held.weights, wanted), wanted) <= 1e-6 for held in after)


def test_too_few_replies_stop_the_run(options: Options) -> None:
    overrides = options("tiny_bert", "fed_sb", "federation.fraction=1.0", "federation.min_replies=4")
    with pytest.raises(RunError, match=r"round 2: 3 valid replies, federation\.min_replies=4 \(client-0: .*no space left"):
        federate(overrides, app=raising(2, "client-0", "client-3"))


def test_a_client_that_never_answers_is_named(options: Options) -> None:
    class DeafGrid(KeepingGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            deaf = [i for i in message_ids if self._deaf(self._pushed[i])]
            return super().pull_messages(set(message_ids) - set(deaf))

        def _deaf(self, message: Message) -> bool:
            return message.metadata.message_type == "train" and decode_instruction(message.content).client == "client-2"

    overrides = options("tiny_bert", "fed_sb", "federation.fraction=1.0", "federation.num_rounds=1", "train.local_steps=1")
    federation = federate(overrides, grid=lambda app, c: DeafGrid(app, c, {1: {"partition-id": 0, "num-partitions": 1}}), timeout=2.0)
    assert federation.records[1].failed == {"client-2": "no reply in time"}


def test_a_node_refuses_the_work_of_another_client(options: Options, tiny_csv: Path) -> None:
    """Two nodes that name their client leave the others without a node."""
    overrides = options("tiny_bert", "fed_sb", "federation.fraction=1.0", "federation.num_rounds=1", "train.local_steps=1", FEWER)
    own = {"data-path": str(tiny_csv)}
    nodes = {1: named("client-3", **own), 2: named("client-1", **own), 3: named("nobody", **own)}
    federation = federate(overrides, grid=lambda app, config: KeepingGrid(app, config, nodes))
    assert set(federation.records[1].clients) == {"client-1", "client-3"}
    assert {e.node: e.instruction.client for e in federation.grid.rounds()[1]} == {1: "client-3", 2: "client-1"}
    assert federation.records[1].failed == dict.fromkeys(("client-0", "client-2", "client-4"), "not connected")


def test_no_client_at_all_stops_the_run(options: Options) -> None:
    with pytest.raises(RunError, match=r"only 0 of 5 clients are connected, 1 are needed; missing: client-0, .*not connected"):
        federate(options("tiny_bert"), grid=lambda app, config: KeepingGrid(app, config, {}))


def test_uniform_weights_count_each_client_once(options: Options, plain: Plain, tmp_path: Path) -> None:
    federation = federate(options("tiny_bert", "fedex_lora", "federation.weighting=uniform"))
    base = pristine(federation)
    for exchanges, during, after in next_instructions(federation, tmp_path):
        update, _ = mean_update(federation, exchanges, during.basis.merge(during.state))  # takes the weighting from the configuration
        wanted = plus(base, update)
        assert all(relative(minus(held.weights, wanted), wanted) <= 1e-6 for held in after)
        base = minus(wanted, product(federation, after[0].state, after[0].basis))
    assert plain("tiny_bert", "fedex_lora").sha256 != federation.sha256


def foretold(federation: Federation) -> tuple[int, int, int]:
    """Return the bytes up, down and one-off that the cost rules foretell."""
    cost = cost_of(federation.config)
    return cost.payload_up, cost.payload_down, cost.payload_one_off


def remembering(trained: dict[tuple[int, str], State]) -> ClientCall:
    """Return the ClientApp, noting what each client trained before it was rounded for the wire."""

    def call(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == "train":
            instruction = decode_instruction(message.content)
            model = model_of(client_config(str(context.run_config["overrides"])), instruction.labels)
            trained[instruction.round, instruction.client] = model.trained()
        return reply

    return call


@pytest.mark.parametrize("method", WHOLE)
def test_a_bfloat16_wire_halves_the_bytes_and_tells_its_gap(options: Options, plain: Plain, method: str, tmp_path: Path) -> None:
    """The gap counts the rounding on both ways: uploads before encoding against what is held after decoding, from above."""
    trained: dict[tuple[int, str], State] = {}
    coarse = federate(options("tiny_bert", method, "federation.wire_dtype=bfloat16"), app=remembering(trained))
    assert 2 * coarse.payload()[0] == plain("tiny_bert", method).payload()[0]
    assert coarse.payload() == foretold(coarse)
    first = coarse.prepared.initial.pick(HEAD)
    for number, (exchanges, during, after) in enumerate(next_instructions(coarse, tmp_path), start=1):
        weights = torch.tensor([e.answer.num_examples for e in exchanges]).double()
        states = [trained[number, e.instruction.client] for e in exchanges]
        products = [product(coarse, state, during.basis.merge(during.state)) for state in states]
        update = {m: sum(w * p[m] for w, p in zip(weights / weights.sum(), products, strict=True)) for m in products[0]}
        head = {n: sum(w * s[n].double() for w, s in zip(weights / weights.sum(), states, strict=True)) for n in first}
        held = product(coarse, after[0].state, after[0].basis)
        for module, residual in after[0].residuals.items():
            held[module] = held[module] + residual - during.residuals.get(module, 0)
        missed = [*minus(held, update).values(), *(after[0].state[n].double() - t for n, t in head.items())]
        moved = [*update.values(), *(t - first[n].double() for n, t in head.items())]
        gap = float(torch.stack([t.norm() for t in missed]).norm() / torch.stack([t.norm() for t in moved]).norm())
        assert gap > 1e-4  # a bfloat16 has 8 significant bits
        assert gap * (1 - 2**-7) <= coarse.records[number].exactness_gap <= 3 * gap + 2**-6


@pytest.mark.parametrize("method", METHODS)
def test_the_held_gap_counts_what_is_rounded_where_a_residual_is_added(plain: Plain, method: str) -> None:
    """Where a method adds nothing to frozen weights, what clients hold is their factors."""
    records = plain("tiny_bert", method).records[1:]
    assert records
    for record in records:
        if STRATEGIES[method].residual_rank is not LowRankStrategy.residual_rank:
            assert record.exactness_gap < record.held_gap < 1e-4
        else:
            assert record.held_gap == record.exactness_gap


def test_a_run_is_evaluated_at_its_start_every_so_often_and_at_its_end(options: Options) -> None:
    more = ["federation.num_rounds=5", "federation.evaluate_clients=true", "data.client_test_fraction=0.3", "train.local_steps=1"]
    rare, always = (federate(options("tiny_bert", "fedavg_lora", *more, f"eval.every={every}")) for every in (2, 1))
    assert rare.sha256 == always.sha256
    for record, each in zip(rare.records, always.records, strict=True):
        due = record.round in (0, 2, 4, 5)
        assert record.metrics == (each.metrics if due else {})
        assert record.client_metrics == (each.client_metrics if due else {})
    assert final_metrics(rare.records) == always.records[5].metrics


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_bytes_of_a_plain_run_are_as_foretold(plain: Plain, model: str, method: str) -> None:
    assert plain(model, method).payload() == foretold(plain(model, method))


def test_bytes_of_a_gradient_start_are_as_foretold(options: Options) -> None:
    more = ["init.kind=gradient", "init.power_iterations=1", "init.oversample=2", "init.num_examples=8", "federation.num_rounds=2"]
    federation = federate(options("tiny_llama", "fed_sb", *more))
    assert federation.payload() == foretold(federation)
    assert federation.records[0].payload_one_off > 0
    assert federation.records[0].payload_up == federation.records[0].payload_down == 0


@pytest.mark.parametrize("truncate", ["null", "4"])
def test_bytes_are_as_foretold_where_the_dense_sum_is_sent(options: Options, truncate: str) -> None:
    """A client that sat out long enough gets W's shape: rank 2 · 3 = 6 a round outweighs 32 x 32 after 3 rounds (16 ranks)."""
    more = ["federation.num_rounds=9", "federation.fraction=0.4", "train.local_steps=1", "rank=6", f"method.options.truncate={truncate}"]
    federation = federate(options("tiny_bert", "fedex_lora", *more))
    roles = {name.role[0] for e in federation.grid.exchanges if e.instruction.bundle for name in e.instruction.bundle.state}
    assert roles == {"U", "V", "D"}
    assert federation.payload() == foretold(federation)


def test_regression_goes_through_a_round(tiny_bert: Path, tmp_path: Path) -> None:
    table = tmp_path / "numbers.csv"
    rows = [f"{'goal ' * (i % 5 + 1)}match,{0.5 * (i % 5)}" for i in range(60)]
    table.write_text("\n".join(["text,score", *rows]) + "\n", encoding="utf-8")
    overrides = [*METHODS["fedex_lora"], *classification(tiny_bert, table), *ROUNDS, "data.task=regression", "data.label=score"]
    federation = federate(overrides)
    assert set(federation.records[-1].metrics) == {"loss", "mse", "pearson", "spearman"}
    assert federation.records[-1].metrics["mse"] == pytest.approx(federation.records[-1].metrics["loss"], rel=1e-5)
    assert all(record.exactness_gap < 1e-5 for record in federation.records[1:])


def test_pairs_of_sentences_go_through_a_round(tiny_bert: Path, tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    rows = [f"the old {a},a new {b},{'same' if a == b else 'other'}" for a in ("goal", "bank") for b in ("goal", "bank")] * 15
    table.write_text("\n".join(["premise,hypothesis,label", *rows]) + "\n", encoding="utf-8")
    overrides = [*METHODS["fed_sb"], *classification(tiny_bert, table), *ROUNDS, "data.text=[premise,hypothesis]"]
    federation = federate(overrides)
    assert "accuracy" in federation.records[-1].metrics
    assert all(record.exactness_gap < 1e-5 for record in federation.records[1:])


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_a_server_optimiser_runs_and_is_told_apart_from_the_gap(options: Options, name: str) -> None:
    federation = federate(
        options(
            "tiny_bert",
            "fed_sb",
            f"federation.server_optimizer.name={name}",
            "federation.server_optimizer.lr=0.5",
            "federation.num_rounds=2",
        )
    )
    for record in federation.records[1:]:
        assert record.exactness_gap < 1e-5
        assert record.extras["server_step"] > 0


def test_a_run_learns(options: Options) -> None:
    """The words of a text give its label away, of which there are three equally frequent ones."""
    clients = ["federation.num_clients=2", "federation.partition.sizes=[2,1]", "federation.fraction=1.0"]
    more = [*clients, "federation.num_rounds=3", "train.local_steps=12", "train.lr=0.1", "init.kind=gradient"]
    federation = federate(options("tiny_bert", "fed_sb", *more))
    assert federation.records[0].metrics["accuracy"] < 0.5
    assert federation.records[-1].metrics["accuracy"] >= 0.6
    assert federation.records[-1].train_loss < 0.9 * federation.records[1].train_loss
