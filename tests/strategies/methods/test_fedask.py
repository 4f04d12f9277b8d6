"""FedASK: two sketches say all of a mean product that they are wide enough for; who gives one of them alone does not count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message
from hypothesis import given
from torch import Tensor

from fedsb.adapters import SPECS
from fedsb.adapters.sketched import Sketched
from fedsb.app.asked import config_of
from fedsb.app.assembly import model_of
from fedsb.client_app import app as client_app
from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.core.state import HEAD, Name, State
from fedsb.report.progress import Progress
from fedsb.wire.messages import decode_instruction
from tests.strategies.federations import Federation, KeepingGrid, federate, split_nodes
from tests.strategies.private_runs import EXAMPLE, run_privately, small
from tests.strategies.rounds import MODELS, Options
from tests.strategies.uploads import A, B, Case, cases, coarse, fine, gaussian, law

SPEC = SPECS["fedask"]
Call = Callable[[Message, Context], Message]
Trained = dict[tuple[int, str], State]


def projected(case: Case, width: int, decode: Callable[[State], State] = fine) -> tuple[Tensor, Tensor]:
    """Return what the server makes of the uploads' sketches of one width, and the dense mean product, without s."""
    clients = [State({B: u[B], A: u[A]}) for u in case.uploads]
    sketch = Sketched(width - case.rank)
    ranges = [sketch.ranges(SPEC, client, 3, 1) for client in clients]
    mean = State({name: torch.stack([s * y[name].double() for s, y in zip(case.shares, ranges, strict=True)]).sum(0) for name in ranges[0]})
    bases = decode(sketch.bases(mean))
    found = [sketch.projections(SPEC, client, bases, 3, 1)[Name("x", "Z")] for client in clients]
    z = torch.stack([s * t.double() for s, t in zip(case.shares, found, strict=True)]).sum(0)
    dense = torch.stack([s * u[B].double() @ u[A].double() for s, u in zip(case.shares, clients, strict=True)]).sum(0)
    return sketch.sides(bases)[B] @ z.T, dense


@pytest.mark.parametrize("decode", [fine, coarse], ids=["float32", "bfloat16"])
@law
@given(cases())
def test_two_wide_sketches_are_the_mean_product(decode: Callable[[State], State], case: Case) -> None:
    """Of any shape, and where the basis was rounded on its way: to float32's accuracy, as far as it still spans what it spanned."""
    found, dense = projected(case, case.rank * len(case.uploads), decode)
    allowed = 1e-5 if decode is fine else 2e-2
    assert float((found - dense).norm()) <= allowed * max(float(u[B].norm() * u[A].norm()) for u in case.uploads)


@law
@given(cases(min_clients=3))
def test_narrow_ones_are_its_projection(case: Case) -> None:
    found, dense = projected(case, case.rank)
    within = found @ torch.linalg.pinv(found) @ dense
    assert float((found - within).norm()) <= 1e-4 * float(dense.norm() + 1)


def test_probes_tell_how_much_lies_outside_the_range_without_bias() -> None:
    sketch, product = Sketched(0), State({Name("x", "B"): gaussian(40, 9, seed=1), Name("x", "A"): gaussian(9, 30, seed=2)})
    q, _ = torch.linalg.qr(gaussian(40, 6, seed=3))
    bases = State({Name("x", "Q"): 1.7 * q})  # no longer orthonormal
    dense = product[B].double() @ product[A].double()
    wanted = float((dense - q.double() @ (q.double().T @ dense)).square().sum())
    found = [float(sketch.outside(bases, sketch.projections(SPEC, product, bases, 0, number)).mean()) for number in range(400)]
    spread = torch.tensor(found).std() / len(found) ** 0.5
    assert abs(sum(found) / len(found) - wanted) < 4 * float(spread)
    assert float(spread) < 0.05 * wanted


def test_each_round_and_module_has_a_sketch_of_its_own_and_all_clients_the_same() -> None:
    eye = State({Name(m, "B"): torch.eye(4) for m in "xy"} | {Name(m, "A"): torch.eye(4) for m in "xy"})
    one, again, later = (Sketched(0).ranges(SPEC, eye, 3, number) for number in (1, 1, 2))
    x, y = Name("x", "Y"), Name("y", "Y")
    assert torch.equal(one[x], again[x])
    assert not torch.equal(one[x], one[y])
    assert not torch.equal(one[x], later[x])


def remembering(trained: Trained, before: Callable[[str, str, int], None] = lambda kind, client, number: None) -> Call:
    """Return a ClientApp that keeps what each client has trained in each round; ``before`` is told whom each message is for."""

    def call(message: Message, context: Context) -> Message:
        instruction, kind = None, message.metadata.message_type
        if not kind.startswith("query."):
            instruction = decode_instruction(message.content)
            before(kind, instruction.client, instruction.round)
        reply = client_app(message, context)
        if instruction is not None and kind == "train":
            model = model_of(config_of(str(context.run_config["overrides"])), instruction.labels)
            trained[instruction.round, instruction.client] = model.copied(*SPEC.factors)
        return reply

    return call


def mean_of(federation: Federation, trained: Trained, number: int) -> tuple[dict[str, Tensor], State]:
    """Return the dense mean product of a round's clients, with s, and their mean head, in float64."""
    counts = {e.instruction.client: float(e.answer.num_examples) for e in federation.grid.rounds()[number] if e.uploaded}
    clients = federation.records[number].clients
    shares = {client: counts[client] / sum(counts[c] for c in clients) for client in clients}
    states, scale = {client: trained[number, client] for client in clients}, federation.prepared.adapted.scale
    products = {
        module: sum(
            share * scale * states[c][Name(module, "B")].double() @ states[c][Name(module, "A")].double() for c, share in shares.items()
        )
        for module in federation.prepared.adapted.shapes
    }
    names = states[clients[0]].pick(HEAD)
    return products, State({name: sum(share * states[c][name].double() for c, share in shares.items()) for name in names})  # type: ignore[misc,arg-type]


def assert_leading(federation: Federation, trained: Trained, *, rank: int = 3) -> None:
    """Hold that what is handed out after each round is the best of its rank of the dense mean, in two halves, and the gap that."""
    for record, state in zip(federation.records[1:], federation.kept.states[1:], strict=True):
        products, head = mean_of(federation, trained, record.round)
        missed = whole = 0.0
        for module, dense in products.items():
            b, a = (state[Name(module, role)].double() for role in "BA")
            u, s, vh = torch.linalg.svd(dense)
            best = (u[:, :rank] * s[:rank]) @ vh[:rank]
            held = federation.prepared.adapted.scale * b @ a
            assert float((held - best).norm()) <= 1e-5 * float(dense.norm())
            present = s[:rank] > 1e-4 * s[0]
            torch.testing.assert_close(b.norm(dim=0)[present], a.norm(dim=1)[present], rtol=1e-4, atol=0)
            missed, whole = missed + float((held - dense).square().sum()), whole + float(dense.square().sum())
        first = federation.prepared.initial.pick(HEAD)
        whole += sum(float((t - first[name].double()).square().sum()) for name, t in head.items())
        assert record.exactness_gap == pytest.approx((missed / whole) ** 0.5, abs=1e-5)
        assert all(torch.allclose(state[name].double(), t, rtol=1e-6, atol=1e-7) for name, t in head.items())


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_a_round_hands_out_the_leading_pair_of_the_mean_product(model: str, freeze: bool, options: Options) -> None:
    """Non-square, Conv1D and grouped heads, three of five clients of unequal size a round, s = 5/3; the whole of it where A rests."""
    trained: Trained = {}
    federation = federate(options(model, "fedask", f"adapter.options.freeze={freeze}", "federation.num_rounds=5"), app=remembering(trained))
    assert_leading(federation, trained)
    assert federation.prepared.strategy.is_exact is freeze
    gaps = [record.exactness_gap or 0 for record in federation.records[1:]]
    assert max(gaps) < 1e-5 if freeze else min(gaps) > 1e-3
    sent = {e.kind: set(e.answer.flats) for e in federation.grid.exchanges}
    layouts = federation.prepared.adapted.layouts
    assert {name.role for name, _ in layouts.up[0].shapes} <= {"Y", HEAD}
    assert {name.role for name, _ in layouts.told.shapes} == {"Z", "P"}
    assert sent["train.projection"] == {"trained"}


def test_the_gap_of_a_narrow_sketch_is_an_estimate_and_says_so(options: Options) -> None:
    trained: Trained = {}
    federation = federate(options("tiny_bert", "fedask", "adapter.options.oversample=0"), app=remembering(trained))
    for record, state in zip(federation.records[1:], federation.kept.states[1:], strict=True):
        products, head = mean_of(federation, trained, record.round)
        scale, first = federation.prepared.adapted.scale, federation.prepared.initial.pick(HEAD)
        away = [scale * state[Name(m, "B")].double() @ state[Name(m, "A")].double() - dense for m, dense in products.items()]
        moved = [*products.values(), *(t - first[name].double() for name, t in head.items())]
        gap = float(torch.stack([t.norm() for t in away]).norm() / torch.stack([t.norm() for t in moved]).norm())
        assert record.exactness_gap == pytest.approx(gap, rel=0.3)
        assert 0 < (record.gap_error or 0) < 0.3


WHOLE = "federation.fraction=1.0"


def test_who_is_lost_between_the_exchanges_does_not_count(options: Options) -> None:
    """Its first reply has helped to choose the range, and nothing of it is in the means."""
    trained: Trained = {}

    def before(kind: str, client: str, number: int) -> None:
        if (kind, client, number) == ("train.projection", "client-1", 2):
            raise RuntimeError("gone")

    federation = federate(options("tiny_bert", "fedask", WHOLE, "adapter.options.oversample=12"), app=remembering(trained, before))
    assert [sorted(record.failed) for record in federation.records[1:]] == [[], ["client-1"], [], []]
    assert "gone" in federation.records[2].failed["client-1"]
    assert "client-1" not in federation.records[2].clients
    assert_leading(federation, trained)


def test_who_has_lost_what_it_trained_is_told_apart_and_the_others_go_on(options: Options, tmp_path: Path) -> None:
    trained: Trained = {}

    def before(kind: str, client: str, number: int) -> None:
        if (kind, client, number) == ("train.projection", "client-2", 1):
            next(tmp_path.rglob("own/client-2*/round-0001.safetensors")).unlink()

    federation = federate(options("tiny_bert", "fedask", WHOLE, f"output={tmp_path / 'run'}"), app=remembering(trained, before))
    assert "what the client kept of its own" in federation.records[1].failed["client-2"]
    assert [len(record.failed) for record in federation.records[1:]] == [1, 0, 0, 0]
    assert len(list(tmp_path.rglob("own/client-0*/*"))) == 1  # what nobody asks for any more is gone


def test_real_nodes_remember_on_their_own_disks_and_end_with_the_same_bits(options: Options, tmp_path: Path) -> None:
    overrides = options("tiny_bert", "fedask", WHOLE, "federation.num_rounds=2", "federation.wait=60")
    alone = federate(overrides)
    nodes = federate(overrides, grid=lambda a, c: KeepingGrid(a, c, split_nodes(tmp_path / "data", overrides, 5)))
    assert nodes.sha256 == alone.sha256
    assert list(tmp_path.glob("home/own/*/client-0*/round-0002.safetensors"))


@pytest.mark.parametrize("freeze", [False, True])
def test_a_second_exchange_is_charged_to_nobody(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, freeze: bool) -> None:
    """The ledger holds a round's training once, and the second reply says nothing of the account or of the data."""
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    more = ("method=fedask", f"adapter.options.freeze={freeze}")
    run = run_privately(small(tiny_bert, tmp_path, *EXAMPLE, *more), tmp_path / "run")
    assert run.error is None
    ledgers = list(tmp_path.rglob("ledgers/*/ledger.jsonl"))
    assert len(ledgers) == 4
    assert {path.read_text().count('"train"') for path in ledgers} == {2}
    second = [e.reply.content["metrics"] for e in run.grid.exchanges if e.kind == "train.projection"]
    assert len(second) == 8
    assert {frozenset(each) for each in second} == {frozenset({"num-examples", "layout"})}


def test_who_watches_is_told_of_each_client_once_a_round(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pace of a round is that of its training."""
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    told: list[str] = []
    monkeypatch.setattr(Progress, "reply", lambda self, client, ok: told.append(client))
    run_privately(small(tiny_bert, tmp_path, *EXAMPLE, "method=fedask"), tmp_path / "run")
    assert sorted(told) == sorted(2 * [f"client-{i}" for i in range(4)])


def test_other_methods_have_no_second_exchange(options: Options) -> None:
    seen: list[Message] = []

    def call(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and not seen:
            asked = Message(message.content, message.metadata.dst_node_id, "train.projection")
            with pytest.raises(UserError, match=r"^method 'fed_sb' has no second exchange in a round"):
                client_app(asked, context)
            seen.append(asked)
        return client_app(message, context)

    federate(options("tiny_bert", "fed_sb", "federation.num_rounds=1"), app=call)
    assert seen


@pytest.mark.parametrize(
    ("given", "said"),
    {
        ("method=fedask", "adapter.options.oversample=-1"): r"^adapter\.options\.oversample=-1 is no number of columns; use a whole number",
        ("method=fedask", "adapter.options.freeze=1"): r"^adapter\.options\.freeze=1 must be true or false$",
        ("method=fedask", "init.kind=pissa"): r"^init\.kind=pissa is not defined for method 'fedask'; choose from random",
        ("method=centralized", "method.adapter=fedask"): r"^method\.adapter=fedask with method=centralized: .*; use method\.adapter=lora$",
    }.items(),
)
def test_what_cannot_be_is_told_in_one_line(given: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(given)
