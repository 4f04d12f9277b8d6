"""DP-SGD through the real path: clipped sums against a loop over single examples, what one example can change, noise, determinism."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clients.private import private_fit
from fedsb.core.rng import torch_stream
from fedsb.core.state import HEAD, Name, sha256, subtract
from fedsb.models.collating import collate
from fedsb.privacy.randomness import secret_streams
from tests.clients.private_cases import (
    SITE,
    TRAIN,
    Case,
    build_case,
    clipped_sum,
    distance,
    drawn,
    fit,
    joint_norm,
    make_case,
    mechanism,
    streams,
    watch,
)

KINDS = [
    ("tiny_bert", "classification", "lora"),
    ("tiny_bert", "classification", "lora_sb"),
    ("tiny_bert", "classification", "head_only"),
    ("tiny_gpt2", "classification", "lora"),
    ("tiny_gpt2", "causal_lm", "lora_sb"),
]


@pytest.fixture(params=KINDS, ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    model, task, family = request.param
    return make_case(request.getfixturevalue(model), task, family)


@pytest.fixture
def small(tiny_bert: Path) -> Case:
    return make_case(tiny_bert, "classification", "head_only")


@pytest.fixture
def language(tiny_gpt2: Path) -> Case:
    return make_case(tiny_gpt2, "causal_lm", "lora_sb")


def median(case: Case) -> float:
    return sorted(case.norms)[len(case.norms) // 2] * 1.01


@pytest.mark.parametrize(("kind", "functorch"), [("flat", False), ("per_layer", False), ("flat", True)])
def test_sum_equals_a_loop_over_single_examples(case: Case, kind: str, functorch: bool) -> None:
    """Whatever fits into memory at once; some examples are clipped and others not."""
    max_norm, rate = median(case), 0.7
    sample = drawn(case, rate)
    assert 5 < len(sample) < 10
    assert (case.adapted.head != ()) == any(name.role == HEAD for name in case.oracle[0])
    assert all(any(bool(g[name].any()) for g in case.oracle) for name in case.oracle[0]), "a comparison of zeros says nothing"
    wanted = clipped_sum([case.oracle[i] for i in sample], max_norm, kind)
    for max_batch in (2, 32):
        (step,) = watch(case, mechanism(max_norm, rate=rate, kind=kind, max_batch=max_batch, functorch=functorch))
        assert distance(step.sum, wanted) < 1e-5 * max_norm


@pytest.mark.parametrize("functorch", [False, True], ids=["hooks", "functorch"])
@pytest.mark.parametrize("kind", ["flat", "per_layer"])
def test_no_example_is_longer_than_c_in_bfloat16(tiny_gpt2: Path, kind: str, functorch: bool) -> None:
    case = make_case(tiny_gpt2, "classification", "lora")
    max_norm = min(case.norms) / 3
    for example in case.features[:3]:
        alone = replace(case, features=[example])
        (step,) = watch(alone, mechanism(max_norm, kind=kind, functorch=functorch), autocast="bfloat16")
        assert joint_norm(step.sum) <= max_norm
        assert joint_norm(step.sum) > max_norm * (1 - 1e-5 if kind == "flat" else 0.2)


def test_a_contribution_depends_on_nobody_else(language: Case) -> None:
    """Of a text alone, and beside texts of a tenth and of ten times its length."""
    max_norm = max(language.norms) * 2
    together = watch(language, mechanism(max_norm))[0].sum
    alone = [watch(replace(language, features=[f]), mechanism(max_norm))[0].sum for f in language.features]
    added = {name: sum(part[name].double() for part in alone) for name in together}
    assert distance(together, added) < 1e-5 * joint_norm(together)
    assert all(distance(part, wanted) < 1e-5 * joint_norm(wanted) for part, wanted in zip(alone, language.oracle, strict=True))


# The fixture is never written to.
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_example_changes_the_sum_by_at_most_c(language: Case, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, 9), min_size=2, max_size=6))
    max_norm = data.draw(st.sampled_from([1e-4, 0.1, 1.0])) * median(language)
    how = mechanism(max_norm, kind=data.draw(st.sampled_from(["flat", "per_layer"])), max_batch=data.draw(st.integers(1, 7)))
    whole, without = (replace(language, features=[language.features[i] for i in indices]) for indices in (chosen, chosen[1:]))
    changed = distance(watch(whole, how)[0].sum, watch(without, how)[0].sum)
    assert changed <= max_norm * (1 + 1e-5)
    assert how.clipping.kind != "flat" or changed == pytest.approx(min(max_norm, language.norms[chosen[0]]), rel=1e-3)


def test_an_empty_sample_makes_a_noised_step(case: Case) -> None:
    """Each tensor gets σ C / (q n), the head too, and every step noise of its own."""
    sigma, max_norm, rate, steps = 1.7, 0.4, 1e-6, 3
    found = watch(case, mechanism(max_norm, sigma=sigma, rate=rate, steps=steps))
    assert len(found) == steps
    assert all(float(t.abs().max()) == 0 for step in found for t in step.sum.values())
    scale = sigma * max_norm / (rate * len(case.features))
    noise = {name: torch.stack([step.grad[name].double().flatten() for step in found]) / scale for name in found[0].grad}
    for t in noise.values():
        assert float(t.std() if t.numel() > 8 else 1.0) == pytest.approx(1, abs=5 / math.sqrt(2 * t.numel()))
    values = torch.cat(list(noise.values()), dim=1)
    assert float(values.std()) == pytest.approx(1, abs=4 / math.sqrt(2 * values.numel()))
    assert float(values.mean()) == pytest.approx(0, abs=4 / math.sqrt(values.numel()))
    assert float((values.corrcoef() - torch.eye(steps)).abs().max()) < 5 / math.sqrt(values.shape[1])


def test_the_sum_is_divided_by_the_expected_batch(small: Case) -> None:
    rate = 0.35
    assert len(drawn(small, rate)) != rate * len(small.features)
    (step,) = watch(small, mechanism(median(small), rate=rate))
    assert all(torch.allclose(step.grad[name], step.sum[name] / 3.5, rtol=1e-6, atol=0) for name in step.sum)
    moved = subtract(small.adapted.trained(), small.state)
    assert all(torch.allclose(moved[name].double(), -step.grad[name].double(), rtol=1e-4, atol=1e-6) for name in step.grad)


@pytest.mark.parametrize("steps", [1, 4])
def test_steps_are_those_of_the_plan(small: Case, steps: int) -> None:
    how = mechanism(1.0, sigma=1.0, rate=0.15, steps=steps, max_batch=1)
    assert fit(small, how).steps == len(watch(small, how)) == steps


def test_noise_comes_before_the_proximal_term_and_the_clip_of_the_step(small: Case) -> None:
    """From the second step on the term pulls to where the round started: ``p₂ = p₁ − η (g₂ + μ (p₁ − p₀))``."""
    rate, mu = 0.5, 0.7
    how = mechanism(1.0, sigma=0.5, rate=0.5, steps=2)
    first, second = watch(small, how, lr=rate, prox_mu=mu)
    found, start = small.adapted.trained(), small.state
    for name, t in found.items():
        after_one = start[name].double() - rate * first.grad[name].double()
        wanted = after_one - rate * (second.grad[name].double() + mu * (after_one - start[name].double()))
        assert torch.allclose(t.double(), wanted, rtol=1e-5, atol=1e-6)
    (step,) = watch(small, replace(how, steps=1), clip_norm=1e-3)
    assert joint_norm(step.grad) > 0.01
    assert joint_norm(dict(subtract(small.adapted.trained(), start))) == pytest.approx(1e-3, rel=1e-2)


def test_noise_comes_before_the_preconditioner(tiny_bert: Path) -> None:
    """The step is of the noised gradient through ``(A Aᵀ + δ)⁻¹`` and ``(Bᵀ B + δ)⁻¹``: before the noise it would move the sensitivity."""
    lora, rate, delta = make_case(tiny_bert, "classification", "lora"), 1e-4, 1e-6
    (step,) = watch(lora, mechanism(1.0, sigma=0.5, rate=0.5, steps=1), lr=rate, preconditioner="riemannian")
    (plain,) = watch(lora, mechanism(1.0, sigma=0.5, rate=0.5, steps=1), lr=rate)
    assert all(torch.equal(t, plain.grad[name]) for name, t in step.grad.items())
    watch(lora, mechanism(1.0, sigma=0.5, rate=0.5, steps=1), lr=rate, preconditioner="riemannian")
    moved = {name: (t.double() - lora.state[name].double()) / -rate for name, t in lora.adapted.trained().items()}
    for name, gradient in step.grad.items():
        if name.role == HEAD:
            continue
        b, a = (lora.state[Name(name.module, role)].double() for role in "BA")
        gram = (a @ a.T if name.role == "B" else b.T @ b) + delta * torch.eye(len(a))
        noised = gradient.double()
        wanted = noised @ torch.linalg.inv(gram) if name.role == "B" else torch.linalg.inv(gram) @ noised
        assert float((moved[name] - wanted).norm()) <= 1e-2 * float(wanted.norm())
        assert float((moved[name] - noised).norm()) > 0.1 * float(noised.norm())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_example_contributes_nothing(tiny_bert: Path, value: float) -> None:
    """One token's embedding is broken, so every text with it is; the checks stay silent on it."""
    case = build_case(tiny_bert, "classification", "lora")
    table = case.adapted.model.get_input_embeddings().weight.data
    table[4] = value
    case.features[3]["input_ids"][2] = 4
    case.features[6]["input_ids"][1] = 4
    sound = [g for i, g in enumerate(case.oracle) if i not in (3, 6)]
    max_norm = 0.5 * max(joint_norm(g) for g in sound)
    assert not any(math.isfinite(joint_norm(case.oracle[i])) for i in (3, 6))
    for max_batch in (3, 32):
        (step,) = watch(case, mechanism(max_norm, max_batch=max_batch))
        assert distance(step.sum, clipped_sum(sound, max_norm)) < 1e-5 * max_norm
    result = fit(case, mechanism(max_norm, sigma=1.0), check=True)
    assert math.isfinite(result.diagnostics["loss"])
    assert all(bool(t.isfinite().all()) for t in case.adapted.trained().values())


def test_equal_streams_give_equal_bits(tiny_bert: Path) -> None:
    case = make_case(tiny_bert, "classification", "lora", dropout=True)

    def bits(seed: int = 0, **options: Any) -> str:
        fit(case, mechanism(sigma=1.0, rate=0.4, steps=3), seed=seed, **options)
        return sha256(case.adapted.trained())

    torch.manual_seed(1)
    before, first = torch.get_rng_state(), bits()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert bits() == first
    assert bits(check=True) == first  # watching changes nothing
    assert len({first, bits(seed=1), bits(seed=2)}) == 3


def test_dropout_is_drawn_from_its_own_stream_alone(tiny_bert: Path) -> None:
    case = make_case(tiny_bert, "classification", "lora", dropout=True)
    (step,) = watch(case, mechanism(1e6))
    adapted, task = case.adapted, case.task
    adapted.install(case.state, case.frozen)
    adapted.model.train()
    with torch_stream(0, "dropout", SITE.client, SITE.round):
        batch = collate(case.features, adapted, task, TRAIN.max_length)
        loss = task.losses(task.forward(adapted.model, batch), batch).sum()
    adapted.model.eval()
    names, parameters = zip(*adapted.trainable().items(), strict=True)
    wanted: dict[Name, torch.Tensor] = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    assert distance(step.sum, wanted) < 1e-4 * joint_norm(wanted)
    assert distance(wanted, clipped_sum(case.oracle, 1e6)) > 0.05 * joint_norm(wanted)


def test_the_masks_of_a_real_node_cannot_be_repeated(tiny_bert: Path) -> None:
    """Who knew them would see one example more or less move the gradients of the others, by more than C. Whatever the public seed is."""
    case = make_case(tiny_bert, "classification", "lora", dropout=True)

    def bits(dropout: torch.Generator, seed: int = 3) -> str:
        case.adapted.install(case.state, case.frozen)
        known = replace(streams(), dropout=dropout)
        how, site = mechanism(sigma=1.0, rate=0.9), replace(SITE, seed=seed)
        private_fit(case.adapted, case.task, case.features, train=TRAIN, site=site, mechanism=how, streams=known)
        return sha256(case.adapted.trained())

    assert bits(streams().dropout) == bits(streams().dropout, seed=4)
    assert len({bits(secret_streams(torch.device("cpu")).dropout) for _ in range(3)} | {bits(streams().dropout)}) == 4


def test_a_failed_round_leaves_nothing_behind(tiny_bert: Path) -> None:
    """What the hooks kept of a forward pass without its backward pass would spoil the next round of the process's one model."""
    case = build_case(tiny_bert, "classification", "lora")
    how = mechanism(1.0, sigma=1.0)
    fit(case, how, check=True)
    sound = sha256(case.adapted.trained())
    broken = replace(case, features=[{**f, "target": 7} for f in [*case.features, *case.features]])
    with pytest.raises(IndexError):
        fit(broken, how)
    assert not case.adapted.model.training
    assert not any(hasattr(p, name) for p in case.adapted.model.parameters() for name in ("grad_sample", "summed_grad"))
    fit(case, how, check=True)
    assert sha256(case.adapted.trained()) == sound
