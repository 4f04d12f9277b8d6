"""What a federation moves is what its cost foretells, over a wire that rounds too, which tells its gap."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message

from fedsb.app.asked import config_of as client_config
from fedsb.app.assembly import model_of
from fedsb.client_app import app as client_app
from fedsb.core.state import HEAD, State
from fedsb.wire.messages import decode_instruction
from tests.strategies.federations import ClientCall, federate, next_instructions, product
from tests.strategies.rounds import CASES, WHOLE, Options, Plain, foretold, minus, undrawn


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
    assert undrawn(coarse) == foretold(coarse)
    first = coarse.prepared.initial.pick(HEAD)
    for number, (exchanges, during, after) in enumerate(next_instructions(coarse, tmp_path), start=1):
        weights = torch.tensor([e.answer.num_examples for e in exchanges]).double()
        states = [coarse.prepared.adapted.spec.fold(trained[number, e.instruction.client]) for e in exchanges]
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


@pytest.mark.parametrize(("model", "method"), CASES)
def test_bytes_of_a_plain_run_are_as_foretold(plain: Plain, model: str, method: str) -> None:
    assert undrawn(plain(model, method)) == foretold(plain(model, method))


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
