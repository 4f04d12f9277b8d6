"""However a batch goes through the model, the gradient is the one of a single pass: in pieces, recomputed, scaled, compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsb.adapters import SPECS, attach
from fedsb.config.compose import load
from fedsb.core.rng import global_generators, torch_generator
from fedsb.core.state import Name
from fedsb.models.adapted import AdaptedModel
from fedsb.models.backward import FLOAT16_SCALE, Backward, checkpointed, first_scale
from fedsb.models.collating import collate
from fedsb.models.fit import Site, fit
from fedsb.tasks.task import TASKS
from tests.models.test_narrow import built, flat, texts

TRAIN = load().train
CASES = [("tiny_llama", "causal_lm"), ("tiny_gpt2", "causal_lm"), ("tiny_bert", "classification"), ("tiny_bert", "regression")]


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[AdaptedModel, str]:
    name, task = request.param
    return built(request.getfixturevalue(name), task, "lora", "adapter.dropout=0.2", dtype="float32"), task


def learnt(task: str, count: int = 9) -> list[dict[str, Any]]:
    """Return texts of which a part is learnt: every piece of a batch has another number of terms."""
    if task != "causal_lm":
        return texts(count)
    return [row | {"learnt": [int(j > i % 3) for j in range(len(row["input_ids"]))]} for i, row in enumerate(texts(count))]


def gradients(adapted: AdaptedModel, backward: Callable[[Any], Tensor], rows: list[dict[str, Any]]) -> tuple[float, dict[Name, Tensor]]:
    adapted.model.zero_grad()
    loss = float(backward(rows))
    return loss, {name: p.grad.clone() for name, p in adapted.trainable().items() if p.grad is not None}


@pytest.mark.parametrize("pieces", [2, 3, 9, 40])
def test_a_batch_in_pieces_has_the_loss_and_the_gradient_of_the_whole(case: tuple[AdaptedModel, str], pieces: int) -> None:
    """The mean is over the batch's terms, be they examples or tokens: no mean of the pieces' means."""
    adapted, task = case
    adapted.model.eval()
    whole, found = (gradients(adapted, Backward(adapted, TASKS[task], replace(TRAIN, accumulation=n)), learnt(task)) for n in (1, pieces))
    assert found[0] == pytest.approx(whole[0], rel=1e-5)
    assert found[1].keys() == whole[1].keys()
    assert torch.allclose(flat(found[1]), flat(whole[1]), rtol=1e-4, atol=1e-6)


def test_pieces_without_a_term_add_nothing(tiny_llama: Path) -> None:
    adapted = built(tiny_llama, "causal_lm", dtype="float32")
    silent = [row | {"learnt": [0] * len(row["input_ids"])} for row in texts(4)]
    loss, found = gradients(adapted, Backward(adapted, TASKS["causal_lm"], replace(TRAIN, accumulation=2)), silent)
    assert loss == 0
    assert not flat(found).any()


def test_recomputed_activations_give_the_same_bits(case: tuple[AdaptedModel, str]) -> None:
    """With its dropout, which is drawn once and repeated."""
    adapted, task = case
    ended = []
    for wanted in (False, True):
        adapted.model.train()
        with global_generators(torch_generator(0, "dropout")), checkpointed(adapted.model, wanted):
            ended.append(gradients(adapted, Backward(adapted, TASKS[task], TRAIN), texts()))
        adapted.model.eval()
    assert ended[0][0] == ended[1][0]
    assert torch.equal(flat(ended[0][1]), flat(ended[1][1]))
    assert not adapted.model.is_activation_checkpointing


def test_recomputing_keeps_less(tiny_llama: Path) -> None:
    adapted = built(tiny_llama, "causal_lm")
    kept = []
    for wanted in (False, True):
        sizes: list[int] = []
        adapted.model.train()
        with (
            checkpointed(adapted.model, wanted),
            torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t),
        ):
            batch = collate(texts(), adapted, TASKS["causal_lm"])
            TASKS["causal_lm"].loss(TASKS["causal_lm"].forward(adapted.model, batch), batch)
        adapted.model.eval()
        kept.append(sum(sizes))
    assert kept[1] < 0.7 * kept[0]


def half(tiny_llama: Path) -> tuple[AdaptedModel, AdaptedModel]:
    """Return the same model with a base in float32 and in float16, which processors without it compute slowly."""
    wide = built(tiny_llama, "causal_lm", dtype="float32")
    state = wide.trained()
    plain = TASKS["causal_lm"].auto_class.from_pretrained(tiny_llama, dtype=torch.float16, **TASKS["causal_lm"].model_options(()))
    attach(plain, SPECS["lora"], targets=sorted(wide.layers), rank=2, scale=wide.scale)
    narrow = AdaptedModel(plain, SPECS["lora"], wide.scale, (), wide.tokenizer, initial=wide.initial)
    for name, p in narrow.trainable().items():
        p.data.copy_(state[name])
    return wide, narrow


def test_float16_scales_its_loss_and_takes_the_scale_out_again(tiny_llama: Path) -> None:
    wide, narrow = half(tiny_llama)
    assert (first_scale(wide.model), first_scale(narrow.model)) == (1.0, FLOAT16_SCALE)
    task = TASKS["causal_lm"]
    loss, wanted = gradients(wide, Backward(wide, task, TRAIN), texts())
    scaled = Backward(narrow, task, TRAIN)
    found = gradients(narrow, scaled, texts())
    assert found[0] == pytest.approx(loss, rel=1e-2)
    assert float((flat(found[1]) - flat(wanted)).norm() / flat(wanted).norm()) < 0.02


def test_a_scale_that_overflows_is_halved_until_it_does_not(tiny_llama: Path) -> None:
    wide, narrow = half(tiny_llama)
    task, huge = TASKS["causal_lm"], Backward(narrow, TASKS["causal_lm"], TRAIN, scale=2.0**40)
    found, wanted = gradients(narrow, huge, texts())[1], gradients(wide, Backward(wide, task, TRAIN), texts())[1]
    assert 1.0 < huge.scale < 2.0**40
    assert float((flat(found) - flat(wanted)).norm() / flat(wanted).norm()) < 0.02


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_a_second_round_compiles_nothing_and_trains_alike(tiny_llama: Path) -> None:
    hold_two_compiled_rounds(built(tiny_llama, "causal_lm", "lora_sb", dtype="float32"))


def hold_two_compiled_rounds(adapted: AdaptedModel) -> None:
    """Train for two rounds: batches of other sizes and lengths, other factors, and a measurement between the rounds."""
    from torch._dynamo.utils import counters

    from fedsb.models.evaluate import evaluate

    start, task = adapted.trained(), TASKS["causal_lm"]
    # Its graphs without the code that torch would make of them, which takes minutes and does not decide whether there are new ones.
    vars(adapted)["compiled"] = torch.compile(adapted.model, dynamic=True, backend="eager")
    train = replace(TRAIN, batch_size=4, compile=True, optimizer="sgd", lr=0.1)
    counters.clear()

    def round_of(number: int, how: Any) -> Any:
        fit(adapted, task, texts(11), train=how, site=Site(seed=3, client="client-1", round=number, num_rounds=2))
        return adapted.trained()

    def begin() -> None:
        for name, p in adapted.trainable().items():
            p.data.copy_(start[name])

    first = round_of(1, train)
    evaluate(adapted, task, [{"input_ids": row["input_ids"]} for row in texts(5)], train=train)
    frames = counters["stats"]["unique_graphs"]
    assert frames > 0
    assert not counters["graph_break"]
    second = round_of(2, train)
    assert counters["stats"]["unique_graphs"] == frames
    begin()
    plain = [round_of(number, replace(train, compile=False)) for number in (1, 2)]
    for found, wanted in zip((first, second), plain, strict=True):
        assert all(torch.allclose(found[name], wanted[name], rtol=1e-3, atol=1e-5) for name in wanted)
