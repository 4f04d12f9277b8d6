"""Private training beside a base in bfloat16: gradients by example are float32, clipped as ever, and the self-checks hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clients.private import sampled_gradients
from fedsb.models.collating import collate
from tests.clients.private_cases import Case, fit, joint_norm, make_case, mechanism, watch

CASES = [("tiny_llama", "causal_lm", "lora"), ("tiny_llama", "causal_lm", "lora_sb"), ("tiny_bert", "classification", "lora_sb")]
WAYS = [("flat", False), ("per_layer", False), ("flat", True)]
SOUND = mechanism(0.5, sigma=1.0, rate=0.4, steps=2, max_batch=4)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    folder, task, family = request.param
    return make_case(request.getfixturevalue(folder), task, family, dropout=True, overrides=("model.dtype=bfloat16",))


@pytest.mark.parametrize(("kind", "functorch"), WAYS)
def test_the_self_checks_pass_in_several_physical_batches(case: Case, kind: str, functorch: bool) -> None:
    result = fit(case, replace(SOUND, functorch=functorch, clipping=replace(SOUND.clipping, kind=kind)), check=True)
    assert result.steps == 2
    assert result.diagnostics["loss"] > 0


def test_gradients_by_example_are_float32_and_add_up_to_the_sums(case: Case) -> None:
    """An example's is a sum over its tokens: taken in float32, it differs from autograd's by the rounding of that one alone."""
    case.adapted.install(case.state, case.frozen)
    batch = collate(case.features[:4], case.adapted, case.task)
    trained = case.adapted.trainable().values()
    case.adapted.model.zero_grad()
    with sampled_gradients(case.adapted.model):
        case.task.losses(case.task.forward(case.adapted.model, batch), batch).sum().backward()
        for p in trained:
            assert p.grad_sample.dtype == torch.float32
            assert torch.allclose(p.grad_sample.sum(0), p.grad, rtol=2**-6, atol=2**-6 * float(p.grad.abs().max()))


@pytest.mark.parametrize(("kind", "functorch"), WAYS)
def test_no_example_is_longer_than_c(case: Case, kind: str, functorch: bool) -> None:
    for example in case.features[:2]:
        alone = replace(case, features=[example])
        (step,) = watch(alone, mechanism(1e-3, kind=kind, functorch=functorch))
        assert 0 < joint_norm(step.sum) <= 1e-3
