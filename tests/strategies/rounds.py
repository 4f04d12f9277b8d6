"""What the laws of whole rounds share: the methods that they hold for, a federation's overrides, and arithmetic on its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from flwr.app import Context, Message

from fedsb.adapters import SPECS, Layouts
from fedsb.app.asked import config_of
from fedsb.app.assembly import model_of
from fedsb.client_app import app as client_app
from fedsb.config.compose import load
from fedsb.core.state import Layout
from fedsb.cost.table import cost_of
from fedsb.wire.messages import decode_instruction
from strategies import STRATEGIES
from strategies.participation import Participation
from tests.strategies.federations import FEDERATED_METHODS, ClientCall, Dense, Federation, mean_update, next_instructions, product, start_of

# alpha / r = 5 / 3, neither 1 nor a power of two; three of five clients a round, of unequal size.
ROUNDS = ["federation.num_rounds=4", "federation.fraction=0.6", "adapter.alpha=5", "train.lr=0.02"]
FEWER = "federation.min_replies=1"  # on real nodes all must be there, unless fewer are asked for
MODELS = ("tiny_bert", "tiny_gpt2", "tiny_llama")
METHODS = {name: [f"method={name}", start_of(name)] for name in FEDERATED_METHODS if SPECS[load([f"method={name}"]).method.adapter].factors}
FAMILIES = {name: SPECS[load([f"method={name}"]).method.adapter] for name in METHODS}
GROWING = [name for name in METHODS if STRATEGIES[name].adds_to_weights()]
LOGGED = [name for name in METHODS if name in GROWING or FAMILIES[name].in_log]
WHOLE = [name for name in METHODS if FAMILIES[name].has_global_model]
NOTHING = Layout(())
BARE = {"layouts": Layouts(NOTHING, (NOTHING,), NOTHING), "scale": 1.0, "participation": Participation(("client-0",))}
EXACT = [name for name in METHODS if STRATEGIES[name](spec=FAMILIES[name], **BARE, **load([f"method={name}"]).method.options).is_exact]
LONGER = {name: ["federation.num_rounds=5"] for name in EXACT}  # every factor has had its turn, and one its second
# Linear layers, Conv1D and grouped queries for what claims to be exact on all of them.
CASES = [(model, name) for name in METHODS for model in (MODELS if name in EXACT else MODELS[:1])]


def kind_of_log(name: str) -> tuple[object, ...]:
    """Return what tells a method's log apart: whether rounds or the start add to W0, and whether its factors rest or learn in turns."""
    family = FAMILIES[name]
    return name in GROWING, bool(family.shifting), *sorted({str(role.learns).isdigit() for role in family.roles if role.down == "log"})


LOGS = {kind_of_log(name): name for name in reversed(LOGGED)}
Options = Callable[..., list[str]]
Plain = Callable[[str, str], Federation]
Learning = dict[tuple[tuple[str, str], int], list[set[str]]]


def looking(found: Learning, run: tuple[str, str]) -> ClientCall:
    """Return a ClientApp that notes, after each training, which parameters of its model may learn."""

    def call(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == "train":
            told = decode_instruction(message.content)
            model = model_of(config_of(str(context.run_config["overrides"])), told.labels).model
            learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            found.setdefault((run, told.round), []).append(learns)
        return reply

    return call


def relative(difference: Dense, reference: Dense) -> float:
    """Return ``‖difference‖ / ‖reference‖`` over all modules."""
    return float(torch.stack([t.norm() for t in difference.values()]).norm() / torch.stack([t.norm() for t in reference.values()]).norm())


def minus(left: Dense, right: Dense) -> Dense:
    return {module: t - right[module] for module, t in left.items()}


def plus(left: Dense, right: Dense) -> Dense:
    return {module: t + right[module] for module, t in left.items()}


def pristine(federation: Federation) -> Dense:
    return {module: w.double() for module, w in federation.fresh_model().weights().items()}


def foretold(federation: Federation) -> tuple[int, int, int]:
    """Return the bytes up, down and one-off that the cost rules foretell."""
    cost = cost_of(federation.config)
    return cost.payload_up, cost.payload_down, cost.payload_one_off


def undrawn(federation: Federation) -> tuple[int, int, int]:
    """Return the bytes of a run up, down and one-off as they were if nothing that came down had been left to be drawn."""
    up, down, one_off = federation.payload()
    size, values = (2 if federation.config.federation.wire_dtype == "bfloat16" else 4), 0
    for instruction in (exchange.instruction for exchange in federation.grid.exchanges if exchange.instruction.ranks):
        whole = federation.prepared.strategy.layouts_of(instruction.client).down.numel
        values += whole - sum(t.numel() for t in instruction.flats.values())
    return up, down + size * values, one_off


def assert_held(federation: Federation, folder: Path) -> None:
    """Hold that after each round, in which three clients of unequal size took part, everyone holds the mean of what they trained."""
    shapes = federation.prepared.adapted.shapes.values()
    assert any(m != n for m, n in shapes)
    base = pristine(federation)  # W0 and, for a method with a residual, what earlier rounds added to it
    checked = 0
    for exchanges, during, after in next_instructions(federation, folder):
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
    assert checked == 3 * (federation.config.federation.num_rounds - 1)  # three clients after each round but the last
    assert all(record.exactness_gap < 1e-5 for record in federation.records[1:])
