"""Private training on instructions: an example is one conversation, and its loss the mean over its own response's tokens."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.clients.private_cases import Case, Gradient, clipped_sum, distance, joint_norm, make_case, mechanism, watch

# By conversation, which of its tokens are a response's: several turns, all but the first, the last alone, and none at all.
RESPONSES = [(slice(1, 2), slice(4, 7)), (slice(1, None),), (slice(-1, None),), (), (slice(2, 5),)]


@pytest.fixture
def answered(tiny_gpt2: Path) -> Case:
    case = make_case(tiny_gpt2, "causal_lm", "lora_sb")
    features = []
    for i, feature in enumerate(case.features):
        learnt = [0] * len(feature["input_ids"])
        for turn in RESPONSES[i % len(RESPONSES)]:
            learnt[turn] = [1] * len(learnt[turn])
        features.append({"input_ids": feature["input_ids"], "learnt": learnt})
    return replace(case, features=features)


def slow_gradients(case: Case) -> list[Gradient]:
    """Return each conversation's gradient in float64: by a pass of its own, and a loop over the tokens of its response."""
    case.adapted.install(case.state, case.frozen)
    double = copy.deepcopy(case.adapted)
    double.model.double().eval()
    trained, found = double.trainable(), []
    for feature in case.features:
        ids, learnt = torch.tensor([feature["input_ids"]]), feature["learnt"]
        logs = double.model(input_ids=ids).logits[0].log_softmax(-1)
        terms = [-logs[i - 1, ids[0, i]] for i in range(1, len(learnt)) if learnt[i]]
        loss = torch.stack(terms).mean() if terms else logs.sum() * 0
        found.append(dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True)))
    return found


@pytest.mark.parametrize(("kind", "functorch"), [("flat", False), ("per_layer", False), ("flat", True)])
def test_a_conversations_gradient_is_that_of_its_own_response(answered: Case, kind: str, functorch: bool) -> None:
    """Beside others with other numbers of learnt tokens, in physical batches of any size; one without any adds nothing."""
    slow = slow_gradients(answered)
    norms = sorted(map(joint_norm, slow))
    assert norms[0] == norms[1] == 0 < norms[2]
    for max_norm in (norms[-1] * 2, norms[len(norms) // 2]):
        wanted = clipped_sum([g for g in slow if joint_norm(g)], max_norm, kind)
        for max_batch in (3, 32):
            (step,) = watch(answered, mechanism(max_norm, kind=kind, max_batch=max_batch, functorch=functorch))
            assert distance(step.sum, wanted) < 1e-5 * max_norm


def test_what_stands_behind_the_last_response_moves_no_gradient(answered: Case) -> None:
    feature = answered.features[0]
    assert any(feature["learnt"])
    longer = {"input_ids": [*feature["input_ids"], 7, 8, 9], "learnt": [*feature["learnt"], 0, 0, 0]}
    sums = [watch(replace(answered, features=[each]), mechanism(10.0))[0].sum for each in (feature, longer)]
    assert joint_norm(sums[0]) > 0
    assert distance(*sums) < 1e-5 * joint_norm(sums[0])
