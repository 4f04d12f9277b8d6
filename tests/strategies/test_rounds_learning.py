"""What learns in a round and nothing beside; what a round begins with; and whose turn it is, whoever stays away."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fedsb.core.state import HEAD
from fedsb.wire.short_states import received
from tests.strategies.federations import federate, next_instructions
from tests.strategies.rounds import FAMILIES, METHODS, Learning, Options, Plain


@pytest.mark.parametrize("method", METHODS)
def test_a_client_trains_what_the_round_says_and_nothing_else(plain: Plain, learning: Learning, method: str) -> None:
    """A frozen factor or a base that could learn beside would move at the client alone, and no upload would show it."""
    federation = plain("tiny_bert", method)
    adapted = federation.prepared.adapted
    for number in federation.grid.rounds():
        places = {f"{module}.{layer.place_of(role)}" for module, layer in adapted.layers.items() for role in adapted.spec.learn(number)}
        assert places
        assert learning[("tiny_bert", method), number] == [places | {*adapted.head}] * 3


@pytest.mark.parametrize("method", METHODS)
def test_all_begin_a_round_with_what_the_last_one_led_to(plain: Plain, method: str) -> None:
    """To the bit, and alike: no round begins anew, and where the rule is a mean it is that of this round's uploads, by their examples."""
    federation = plain("tiny_bert", method)
    layouts, kept = federation.prepared.adapted.layouts, federation.kept
    for number, exchanges in federation.grid.rounds().items():
        for exchange in exchanges:
            sent = received(exchange.instruction, layouts.down, layouts.down, federation.config.seed)
            assert all(torch.equal(t, kept.states[number - 1][name]) for name, t in sent.items())
        if not federation.prepared.strategy.is_the_mean():
            continue
        uploads = [(e.answer.state(layouts.up_in(number)), e.answer.num_examples) for e in exchanges]
        after, total = kept.bases[number].merge(kept.states[number]), sum(count for _, count in uploads)
        for name in uploads[0][0]:
            mean = torch.stack([count / total * state[name].double() for state, count in uploads]).sum(0)
            torch.testing.assert_close(after[name].double(), mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", [name for name, family in FAMILIES.items() if family.turns > 1])
def test_turns_go_on_by_the_round_whoever_stays_away(options: Options, method: str, tmp_path: Path) -> None:
    """A client that was away for a turn holds what the others made of it, and trains the factor whose turn it is."""
    federation = federate(options("tiny_bert", method, "faults.dropout=0.4", "federation.fraction=1.0", "federation.num_rounds=6"))
    away = [client for record in federation.records[1:] for client in record.failed]
    assert 3 < len(away) < 25
    spec, kept = federation.prepared.adapted.spec, federation.kept
    held = [basis.merge(state) for basis, state in zip(kept.bases, kept.states, strict=True)]
    for number, (before, after) in enumerate(pairwise(held), start=1):
        assert {name.role for name, t in after.items() if not torch.equal(t, before[name])} == {*spec.learn(number), HEAD}
    for _, _, after_all in next_instructions(federation, tmp_path):
        assert len(after_all) == 5
        assert all(torch.equal(one.weights[module], after_all[0].weights[module]) for one in after_all for module in one.weights)


@pytest.mark.parametrize(("method", "shared"), [("fedsa_lora", True), ("local_only", False)])
def test_what_a_client_keeps_is_in_no_message(plain: Plain, method: str, shared: bool) -> None:
    """FedSA's messages have room for A (r, n) alone, as they lie on the wire, and neither B nor the head; who is alone sends nothing."""
    federation = plain("tiny_bert", method)
    wanted = sum(3 * n for _, n in federation.prepared.adapted.shapes.values()) if shared else 0
    assert federation.grid.exchanges
    for exchange in federation.grid.exchanges:
        arrays = [array for record in exchange.reply.content.array_records.values() for array in record.values()]
        assert sum(array.numpy().size for array in arrays) == (wanted if exchange.kind == "train" else 0)
        assert sum(flat.numel() for flat in exchange.instruction.flats.values()) == wanted
        assert not exchange.instruction.bundle
