"""Rounds whose uploads the server gets as their sum alone, through the real ClientApp."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message

from fedsb.client_app import app as client_app
from fedsb.config.compose import load
from fedsb.core.errors import RunError, UserError
from fedsb.core.state import MASKED, Name, State
from fedsb.secure.fixed_point import FixedPoint
from fedsb.wire.messages import decode_instruction
from fedsb.wire.secured import TERMS, words_of
from strategies import STRATEGIES
from strategies.combinations import Wanted, check_wanted
from tests.strategies.federations import ClientCall, Federation, KeepingGrid, federate
from tests.strategies.private_runs import EXAMPLE, run_privately, small
from tests.strategies.rounds import FAMILIES, METHODS, Options, Plain, foretold

SECURE = ("federation.secure_sum=true", "federation.exactness=false")
ALL = ("federation.fraction=1.0", "federation.num_rounds=1", "federation.secure_dropout=0.4")
# A core, factors that learn in turns and live in the log, a part that is kept, cores that are folded, and a rule that follows the mean.
SUMMED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("fed_sb", "rolora", "fedsa_lora", "fedsvd"), ()),
    "ravan": ("federation.secure_bound=1",),
    **dict.fromkeys(("ffa_lora", "lora_xs", "fedavg_lora", "head_only"), ("federation.num_rounds=1",)),
}
AFTER = ("train.survivors", "train.unmask")  # the upload: who drops out then is in the sum


def held(federation: Federation, number: int) -> State:
    """Return what clients hold after a round, the log's factors included."""
    return federation.kept.bases[number].merge(federation.kept.states[number])


def farthest(one: State, other: State) -> float:
    return max(float((t.double() - other[name].double()).abs().max()) for name, t in one.items())


def lacking(kinds: dict[str, Collection[str]]) -> ClientCall:
    """Return the ClientApp with clients that fail in messages of some kinds."""

    def call(message: Message, context: Context) -> Message:
        gone = kinds.get(message.metadata.message_type, ())
        if gone and decode_instruction(message.content).client in gone:
            raise OSError("gone")
        return client_app(message, context)

    return call


@pytest.mark.parametrize("method", SUMMED)
def test_a_secure_sum_is_the_plain_one_to_its_rounding(method: str, plain: Plain, options: Options) -> None:
    """After the first round, behind which training differs by what training makes of the last bits; the stated error is in the records."""
    federation = federate(options("tiny_bert", method, *SECURE, "federation.num_rounds=2", *SUMMED[method]))
    apart = farthest(held(federation, 1), held(plain("tiny_bert", method), 1))
    largest = max(float(t.abs().max()) for t in held(federation, 1).values())
    point = FixedPoint(federation.config.federation.secure_bound or 0.05, 3)  # two steps of 0.02
    assert apart <= point.worst(3, 1.0) + 2e-7 * largest
    record = federation.records[1]
    assert 0 < record.extras["secure_gap"] < record.extras["secure_gap_most"] < 1e-5
    assert record.extras["secure_cut"] == 0
    assert (record.exactness_gap, record.failed) == (None, {})
    assert len(record.clients) == 3


@pytest.mark.parametrize(
    "dropped",
    [
        {"train": ["client-1"]},
        {"train": ["client-0", "client-4"]},
        {"train.keys": ["client-0"], "train": ["client-2"]},
        {"train.shares": ["client-3"]},
        {"train.survivors": ["client-1"], "train.unmask": ["client-4"]},
        {"train.unmask": ["client-3", "client-4"]},
    ],
    ids=[
        "before the upload",
        "two before the upload",
        "before keys and before the upload",
        "before shares",
        "when it is to confirm who is in the sum, and when that is unmasked",
        "when the sum is unmasked",
    ],
)
def test_clients_that_drop_out_cost_their_summand_alone(dropped: dict[str, list[str]], options: Options) -> None:
    secure = federate(options("tiny_bert", "fed_sb", *SECURE, *ALL), app=lacking(dropped))
    gone = {client for kind, some in dropped.items() if kind not in AFTER for client in some}
    plain = federate(options("tiny_bert", "fed_sb", "federation.exactness=false", *ALL), app=lacking({"train": gone}))
    assert farthest(held(secure, 1), held(plain, 1)) < 1e-7
    assert sorted(secure.records[1].clients) == sorted(plain.records[1].clients)
    assert secure.records[1].failed.keys() == {client for some in dropped.values() for client in some}
    assert secure.records[1].train_loss == pytest.approx(plain.records[1].train_loss)


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("train.keys", "2 of 5 clients showed keys, and a secure sum needs 3 (federation.secure_dropout=0.4); nothing was unmasked"),
        ("train.shares", "2 of 5 clients gave shares of their keys, and"),
        ("train", "2 of 5 clients sent an upload, and"),
        ("train.survivors", "2 of 5 clients confirmed who is in the sum, and"),
        ("train.unmask", "2 of 5 clients gave the shares that unmask the sum, and"),
    ],
)
def test_below_the_threshold_nothing_is_unmasked(kind: str, line: str, options: Options) -> None:
    grids: list[KeepingGrid] = []

    def grid(app: ClientCall, config: dict[str, object]) -> KeepingGrid:
        grids.append(KeepingGrid(app, config, {1: {"partition-id": 0, "num-partitions": 1}}))
        return grids[0]

    with pytest.raises(RunError) as stopped:
        federate(options("tiny_bert", "fed_sb", *SECURE, *ALL), app=lacking({kind: [f"client-{i}" for i in range(3)]}), grid=grid)
    assert f"round 1: {line}" in str(stopped.value)
    assert len([e for e in grids[0].exchanges if e.kind == "train.unmask" and e.uploaded]) == (2 if kind == "train.unmask" else 0)


def test_the_server_gets_no_upload_and_of_each_client_one_kind_of_share(plain: Plain, options: Options) -> None:
    """Every array of every message is held against what the clients had: those of a run that differs in nothing but the masks."""
    secure = federate(options("tiny_bert", "fed_sb", *SECURE, "federation.num_rounds=1"))
    open_ = plain("tiny_bert", "fed_sb")
    uploads = {e.instruction.client: e.answer.state(open_.prepared.adapted.layouts.up_in(1)) for e in open_.grid.rounds()[1]}
    begun = open_.kept.bases[0].merge(open_.kept.states[0])
    replies = [e for e in secure.grid.exchanges if e.uploaded]
    assert {e.kind: sum(other.kind == e.kind for other in replies) for e in replies} == dict.fromkeys(
        ("train.keys", "train.shares", "train", "train.survivors", "train.unmask"), 3
    )
    for e in secure.grid.rounds()[1]:
        told, upload = e.instruction.secured, uploads[e.instruction.client]
        assert told is not None
        change = torch.cat([(t.double() - begun[name].double()).reshape(-1) for name, t in upload.items()]).numpy()
        words = FixedPoint(told.bound, 3).encode(change, told.share(e.instruction.client))
        masked = words_of(State({Name("", MASKED): e.answer.flats[MASKED]}))
        assert not (masked == words).any()
        plain_bytes = [np.ascontiguousarray(values).tobytes()[:16] for t in upload.values() for values in (t.numpy(), t.double().numpy())]
        sent = [bytes(array.data) for r in replies for record in r.reply.content.array_records.values() for array in record.values()]
        assert not any(piece in data for piece in plain_bytes for data in sent)


def test_an_upload_is_never_sent_without_masks(options: Options) -> None:
    """A server that leaves out what belongs to the secure sum, in a run that has one, gets no upload."""

    def call(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            content = message.content
            content["arrays"] = ArrayRecord({key: array for key, array in content["arrays"].items() if not key.startswith("sealed")})
        return client_app(message, context)

    with pytest.raises(RunError, match=r"0 valid replies.*the server asks for an upload without masks"):
        federate(options("tiny_bert", "fed_sb", *SECURE, *ALL), app=call)


def test_values_beyond_the_bound_are_cut_counted_and_told(options: Options) -> None:
    federation = federate(options("tiny_bert", "fed_sb", *SECURE, *ALL, "federation.secure_bound=0.003"))
    record = federation.records[1]
    assert record.extras["secure_cut"] > 0
    assert any("changed by more than 0.003 and were cut" in line for line in record.remarks)
    moved = farthest(federation.kept.states[1], federation.kept.states[0])
    assert 0.0029 < moved <= 0.003 + 1e-7


def test_bytes_are_those_that_were_foretold(options: Options) -> None:
    federation = federate(options("tiny_bert", "rolora", *SECURE, "federation.num_rounds=2", "federation.weighting=fedau"))
    assert federation.payload() == foretold(federation)


def test_a_private_run_is_the_same_with_and_without(tiny_bert: Path, tmp_path: Path) -> None:
    """The noise is the clients' own, before the sum; what the account says travels beside it."""
    overrides = small(tiny_bert, tmp_path, *EXAMPLE, "federation.exactness=false", "federation.num_rounds=1")
    plain = run_privately(overrides, tmp_path / "plain")
    secure = run_privately([*overrides, "federation.secure_sum=true"], tmp_path / "secure")
    assert farthest(secure.last, plain.last) < 1e-7
    assert secure.records[1].epsilon == plain.records[1].epsilon
    assert secure.records[1].extras["secure_cut"] == 0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["federation.exactness=true"], "federation.exactness=true: the gap is measured from single uploads"),
        (["privacy=client", "privacy.noise_multiplier=1", "federation.weighting=uniform"], "privacy.unit=client: the server clips each"),
        (["federation.wire_dtype=int8"], "federation.wire_dtype: a masked value takes four bytes"),
        (["init.kind=gradient"], "init.kind=gradient: the start would show the server"),
        (["federation.weighting=fedau", "federation.cutoff=51"], "federation.cutoff: a client may count that many times another"),
        (
            ["method=fedsa_lora", "init.kind=null", "train.local_steps=1"],
            "train.local_steps=1: the first step of a client that begins anew",
        ),
        (["faults.nan=0.1"], "faults.nan: nobody could see"),
        (["federation.num_clients=1"], "a round of 1 client: its sum is its upload"),
        (["train.optimizer=sgd"], "nothing bounds by how much train.optimizer=sgd"),
        (["method=ravan", "init.kind=null"], "its H is uploaded with another factor in it"),
        (["train.weight_decay=0.1"], "nothing bounds by how much train.optimizer=adamw"),
        (["federation.secure_dropout=0.5"], "federation.secure_dropout=0.5 is out of range"),
    ],
)
def test_what_it_does_not_go_with_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as refused:
        load(["method=fed_sb", "init.kind=orthogonal", *SECURE, *overrides])
    assert said in str(refused.value)


def test_whether_the_sum_is_enough_is_read_off_the_method() -> None:
    refused = set()
    for method in METHODS:
        with suppress(UserError):
            check_wanted(STRATEGIES[method], FAMILIES[method], Wanted(secure_sum=True), method)
            continue
        refused.add(method)
    found = METHODS.keys() - refused
    assert {*SUMMED, "lora_one"} - {"head_only"} <= found  # which has no factors
    assert {"fedex_lora", "flora", "flexlora", "fedask", "hetlora"} <= refused
    with pytest.raises(UserError, match=r"secure_sum=true is not defined with method=fedex_lora, which makes more of the uploads"):
        check_wanted(STRATEGIES["fedex_lora"], FAMILIES["fedex_lora"], Wanted(secure_sum=True), "method=fedex_lora")


def test_wrong_shares_end_no_round_and_are_told(options: Options) -> None:
    """One of five gives zeros for the shares of all others' keys, and three are enough."""

    def call(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == "train.unmask" and message.content["config"]["client"] == "client-0":
            [(key, array)] = reply.content["arrays"].items()
            said = array.numpy()
            reply.content["arrays"] = ArrayRecord({key: Array(np.concatenate([said[:TERMS], 0 * said[TERMS:]]))})
        return reply

    lied, true = (federate(options("tiny_bert", "fed_sb", *SECURE, *ALL), app=app) for app in (call, client_app))
    assert farthest(held(lied, 1), held(true, 1)) == 0
    assert [line for line in lied.records[1].remarks if line.startswith("client-0: it gave wrong shares")]
    assert not true.records[1].remarks
