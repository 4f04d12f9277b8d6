"""RAVAN: heads that share no direction, the mean of t_h H_h and not of each, and bytes of the cores alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shlex import join

import pytest
import torch
from flwr.app import Context, Message
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clients.private import sampled_gradients
from fedsb.adapters import SPECS, LowRankLayer, attach
from fedsb.adapters.families.ravan import ravan
from fedsb.adapters.heads import head_shapes, scaled_cores, split
from fedsb.app.asked import config_of
from fedsb.app.assembly import model_of
from fedsb.client_app import app as client_app
from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.core.rng import torch_generator
from fedsb.core.state import HEAD, Name, State, squared_norm, subtract
from fedsb.cost.table import cost_of
from fedsb.run.checkpoint import load_checkpoint
from fedsb.runtime.grids import grid_for
from fedsb.server_app import serve
from fedsb.wire.messages import decode_instruction
from tests.strategies.dense import product_of
from tests.strategies.federations import Federation, classification, federate
from tests.strategies.rounds import ROUNDS

Run = Callable[..., Federation]


@pytest.fixture
def run(tiny_bert: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    return lambda *more, **given: federate([*classification(tiny_bert, tiny_csv), "method=ravan", *ROUNDS, *more], **given)


def drawn(m: int, n: int, rank: int, heads: int, seed: int = 0) -> dict[str, Tensor]:
    shapes = head_shapes(m, n, rank, heads)
    return {role: torch.randn(shape, generator=torch_generator(seed, role), dtype=torch.float64) for role, shape in shapes.items()}


@given(m=st.integers(1, 9), n=st.integers(1, 9), rank=st.integers(1, 3), heads=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_its_product_is_the_sum_of_the_heads(m: int, n: int, rank: int, heads: int) -> None:
    factors = drawn(m, n, rank, heads)
    wanted = product_of("ravan", {**factors, "H": scaled_cores(factors)})
    left, right = split(tuple(factors[role] for role in ("B", "H", "t", "A")))
    torch.testing.assert_close(left @ right, wanted)
    module = ravan(heads).build(head_shapes(m, n, rank, heads)).double()  # type: ignore[misc]
    with torch.no_grad():
        for role, t in factors.items():
            getattr(module, role).copy_(t)
        x = torch.randn(2, 3, n, dtype=torch.float64)
        torch.testing.assert_close(module(x), x @ wanted.T)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_columns_and_rows_are_orthonormal_over_all_heads(heads: int) -> None:
    start = ravan(heads).starts["orthogonal"]
    assert start is not None
    made = start({"x": torch.zeros(40, 24)}, 5, 0)
    b, a = made[Name("x", "B")].double(), made[Name("x", "A")].double()
    eye = torch.eye(5 * heads, dtype=torch.float64)
    torch.testing.assert_close(b.T @ b, eye, rtol=0, atol=1e-6)
    torch.testing.assert_close(a @ a.T, eye, rtol=0, atol=1e-6)
    assert not made[Name("x", "H")].any()


def test_a_run_begins_at_the_base_and_every_core_has_a_gradient(run: Run) -> None:
    federation = run("federation.num_rounds=1")
    adapted = federation.fresh_model()
    adapted.install(federation.prepared.initial, federation.frozen.view())
    for layer in adapted.layers.values():
        assert not layer.delta().any()
        assert torch.equal(layer.weight_of("t"), torch.ones(4))
    moved = federation.kept.states[-1].pick("H")
    assert all(t.flatten(1).any(dim=1).all() for t in moved.values())


def test_the_server_takes_the_mean_of_products_which_no_product_of_means_is(run: Run) -> None:
    """Of the scalars and cores as each client ended with them, which go apart: no mean of either says what the mean of both is."""
    trained: dict[tuple[int, str], State] = {}

    def remembering(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == "train":
            told = decode_instruction(message.content)
            model = model_of(config_of(str(context.run_config["overrides"])), told.labels)
            trained[told.round, told.client] = model.copied("H", "t")
        return reply

    federation = run("federation.num_rounds=2", "train.lr=0.2", app=remembering)
    for number, exchanges in federation.grid.rounds().items():
        counts = [(e.instruction.client, float(e.answer.num_examples)) for e in exchanges]
        clients = [(count / sum(c for _, c in counts), trained[number, client]) for client, count in counts]
        missed = whole = 0.0
        for name, held in federation.kept.states[number].pick("H").items():
            t, h = ([state[Name(name.module, role)].double() for _, state in clients] for role in "tH")
            shares = [share for share, _ in clients]
            wanted = sum((w * x[:, None, None] * y for w, x, y in zip(shares, t, h, strict=True)), start=torch.zeros(()))
            torch.testing.assert_close(held.double(), wanted, rtol=1e-5, atol=1e-7)
            means = [sum((w * x for w, x in zip(shares, each, strict=True)), start=torch.zeros(())) for each in (t, h)]
            missed += float((means[0][:, None, None] * means[1] - wanted).square().sum())
            whole += float(wanted.square().sum())
        assert (missed / whole) ** 0.5 > 1e-3


@pytest.mark.parametrize("more", [(), ("adapter.options.heads=2",), ("adapter.options.heads=1", "adapter.scale=1.7")])
def test_it_is_exact_and_moves_the_cores_and_nothing_once(more: tuple[str, ...], run: Run) -> None:
    federation = run(*more)
    heads = int(more[0][-1]) if more else 4
    adapted, cost = federation.prepared.adapted, cost_of(federation.config)
    head = federation.prepared.initial.pick(HEAD).numel
    assert cost.up == cost.down == heads * 3**2 * len(adapted.shapes) + head
    assert cost.trained == cost.up + heads * len(adapted.shapes)
    assert federation.payload() == (cost.payload_up, cost.payload_down, 0)
    assert max(record.exactness_gap or 0.0 for record in federation.records[1:]) < 1e-5


def test_its_scalars_learn_and_come_up_in_the_cores_alone(run: Run) -> None:
    federation = run("federation.num_rounds=2")
    adapted = federation.prepared.adapted
    adapted.install(federation.kept.states[-1], federation.frozen.view(), 3)
    assert {name.role for name in adapted.trainable()} == {"H", "t", HEAD}
    for name, parameter in adapted.trainable().items():
        if name.role == "t":
            parameter.data.fill_(0.5)
    sent = adapted.sent(adapted.trained(), 3)
    assert {name.role for name in sent} == {"H", HEAD}
    halved = State({name: 0.5 * t for name, t in federation.kept.states[-1].pick("H").items()})
    assert all(torch.equal(t, sent[name]) for name, t in halved.items())


@pytest.mark.parametrize("base", [lambda: nn.Linear(9, 12), lambda: Conv1D(12, 9)], ids=["linear", "conv1d"])
def test_cores_and_scalars_have_the_gradient_of_each_example_alone(base: Callable[[], nn.Module]) -> None:
    layer = LowRankLayer(base(), ravan(3), 2, 0.6)
    for i, role in enumerate(layer.spec.factors):
        weight = layer.weight_of(role)
        weight.data = torch.randn(weight.shape, generator=torch_generator(i, "filled"))
    trained = [layer.weight_of(role) for role in ("H", "t")]
    x, weights = (torch.randn(3, 4, size, generator=torch_generator(size, "x")) for size in (9, 12))
    alone = [torch.autograd.grad((layer(x[i : i + 1]).square() * weights[i]).sum(), trained) for i in range(3)]
    with sampled_gradients(layer):
        (layer(x).square() * weights).sum().backward()
        found = [p.grad_sample for p in trained]
    for i, together in enumerate(found):
        torch.testing.assert_close(together, torch.stack([gradients[i] for gradients in alone]), rtol=1e-4, atol=1e-3)


def test_clients_side_by_side_end_where_each_ends_alone(tiny_bert: Path, tiny_csv: Path, tmp_path: Path, run: Run) -> None:
    states = []
    for size in (1, 3):
        overrides = [*classification(tiny_bert, tiny_csv), "method=ravan", "federation.num_rounds=2", f"runtime.stack={size}"]
        config, folder = load(overrides), tmp_path / str(size)
        serve(config, grid_for(config, {"overrides": join(overrides), "output": str(folder)}), folder)
        states.append(load_checkpoint(folder / "checkpoints").state)
    alone, stacked = states
    assert squared_norm(subtract(stacked, alone)) < 1e-10 * squared_norm(alone)


@pytest.mark.parametrize("heads", [0, -1, 1.5, "many"])
def test_a_number_of_heads_that_is_none_is_refused(heads: object) -> None:
    with pytest.raises(UserError, match=r"^adapter\.options\.heads=.* is no number of heads; use a whole number of at least 1$"):
        SPECS["ravan"].having({"heads": heads})


def test_heads_that_do_not_fit_are_refused() -> None:
    said = r"^rank \(5\), which needs 20 here, exceeds min\(out, in\) = 16 of '0'; lower rank"
    with pytest.raises(UserError, match=said):
        attach(nn.Sequential(nn.Linear(16, 40)), SPECS["ravan"], targets=["0"], rank=5, scale=1.0)
    assert load(["method=ravan", "adapter.options.heads=2"]).adapter.options == {"heads": 2}
