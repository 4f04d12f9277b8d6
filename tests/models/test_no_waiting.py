"""Inside a training step the host reads nothing off the device that the model is on.

There is no GPU here: ``meta`` stands in for one. A tensor there has no values, so whatever asks for one fails, and so does a copy to the
host. That torch itself waits for nothing on a GPU is held by ``tests/test_gpu.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clients.clipping import Clipping
from clients.private import Mechanism, private_lesson
from clients.sampling import sample_backward, sampled_gradients
from clients.stacked import taught_together
from fedsb.config.compose import load
from fedsb.models.adapted import AdaptedModel
from fedsb.models.backward import Backward
from fedsb.models.evaluate import evaluate
from fedsb.models.fit import Lesson, Site, dropout_of, fit_lesson, taught
from fedsb.privacy.randomness import simulated_streams
from fedsb.stack.stack import Stack
from fedsb.tasks.task import TASKS
from tests.clients.private_cases import build_case
from tests.core.test_devices import Crossings

STEPS = 3
SITE = Site(seed=3, client="client-1", round=2, num_rounds=4)
TRAIN = replace(load().train, optimizer="sgd", batch_size=3, local_epochs=9, clip_norm=0.5, prox_mu=0.1, weight_decay=0.01)
KINDS = [("tiny_bert", "classification"), ("tiny_llama", "causal_lm"), ("tiny_gpt2", "causal_lm")]


class Enough(Exception):
    """As many steps as a test wants."""


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def valueless(request: pytest.FixtureRequest) -> tuple[AdaptedModel, str, list[dict[str, Any]]]:
    """A model without values, its dropout on, and texts of several lengths."""
    name, task = request.param
    case = build_case(request.getfixturevalue(name), task, "lora", dropout=True)
    adapted = copy.deepcopy(case.adapted)
    adapted.model.to("meta").train()
    return adapted, task, case.features


def steps_of(lesson: Lesson[Any], backward: Callable[[Any], Tensor]) -> int:
    """Teach some steps of a lesson whose end, which reads its loss, is not reached; return how many."""
    count = 0

    def counted(examples: Any) -> Tensor:
        nonlocal count
        if count == STEPS:
            raise Enough
        count += 1
        return backward(examples)

    with pytest.raises(Enough):
        taught(lesson, counted)
    return count


@pytest.mark.parametrize(
    "how",
    [{}, {"packing": True}, {"accumulation": 2}],
    ids=["plain", "packing", "accumulation"],
)
def test_a_plain_step_reads_nothing(valueless: tuple[AdaptedModel, str, list[dict[str, Any]]], how: dict[str, Any]) -> None:
    adapted, task, features = valueless
    if "packing" in how and task != "causal_lm":
        pytest.skip("packing is for language models")
    train = replace(TRAIN, **how)
    lesson = fit_lesson(adapted.trainable(), features, train=train, site=SITE)
    assert steps_of(lesson, Backward(adapted, TASKS[task], train)) == STEPS


@pytest.mark.parametrize("kind", ["flat", "per_layer"])
def test_a_private_step_reads_nothing(valueless: tuple[AdaptedModel, str, list[dict[str, Any]]], kind: str) -> None:
    """Without noise, whose generator would have to be one of a device without values."""
    adapted, task, features = valueless
    trained = adapted.trainable()
    lesson = private_lesson(
        adapted,
        trained,
        lambda batch: TASKS[task].forward(adapted.model, batch),
        TASKS[task],
        features,
        train=TRAIN,
        site=SITE,
        mechanism=Mechanism(Clipping(kind, 1.0, 0.0), 0.5, 9),
        streams=simulated_streams(0, "client-1", 1, "train", torch.device("cpu")),
    )
    with sampled_gradients(adapted.model):
        backward = lambda asked: sample_backward(adapted, TASKS[task], asked, train=TRAIN, parameters=list(trained.values()))  # noqa: E731
        assert steps_of(lesson, backward) == STEPS


def test_clients_side_by_side_read_nothing(valueless: tuple[AdaptedModel, str, list[dict[str, Any]]]) -> None:
    adapted, task, features = valueless
    stack = Stack(adapted, [dropout_of(replace(SITE, client=client)) for client in "ab"])

    def some(member: int) -> Lesson[int]:
        lesson = fit_lesson(stack.members[member], features[member:], train=TRAIN, site=SITE)
        asked = next(lesson)
        for _ in range(STEPS):
            asked = lesson.send((yield asked))
        return STEPS

    assert taught_together(stack, TASKS[task], {i: some(i) for i in range(2)}, train=TRAIN) == {0: STEPS, 1: STEPS}


@pytest.mark.parametrize("family", ["lora", "lora_sb"])
def test_a_round_goes_down_and_up_in_one_copy_each(tiny_bert: Path, family: str) -> None:
    """And what is held from the log goes down once, however many rounds there are."""
    case = build_case(tiny_bert, "classification", family)
    adapted = copy.deepcopy(case.adapted)
    adapted.model.to("meta")
    held = len(case.frozen.basis) > 0
    with Crossings() as first:
        adapted.install(case.state, case.frozen)
    with Crossings() as second:
        adapted.install(case.state, case.frozen)
        trained = adapted.trained()
    assert (first.down, first.up) == (1 + held, 0)
    assert (second.down, second.up) == (1, 1)
    assert {name: t.shape for name, t in trained.items()} == {name: p.shape for name, p in adapted.trainable().items()}


def test_an_evaluation_moves_two_numbers_an_example_up(valueless: tuple[AdaptedModel, str, list[dict[str, Any]]]) -> None:
    """And never a language model's outputs, of which a token has as many as there are words."""
    adapted, task, features = valueless
    if task == "causal_lm":
        features = [{"input_ids": row["input_ids"]} for row in features]
    with Crossings() as crossings:
        evaluate(adapted, TASKS[task], features, train=TRAIN)
    most = {"causal_lm": 2, "classification": 4}[task]  # the logits of three classes, and the target
    assert crossings.values_up <= most * len(features)
