"""No self-check fails on sound training, however empty, short, broken, tiny or opposite its examples are."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import chi2

from clients.mechanism_checks import NEVER, too_small
from fedsb.config.checks_privacy import LEAST_NORM
from fedsb.core.state import State
from tests.clients.private_cases import Case, build_case, drawn, make_case, mechanism
from tests.clients.self_checks.checked import SOUND, code

STARTS = [
    ("tiny_bert", "classification", "lora", "random"),
    ("tiny_bert", "classification", "lora_sb", "weight_svd"),
    ("tiny_bert", "classification", "head_only", "none"),
    ("tiny_bert", "regression", "lora", "later"),
    ("tiny_gpt2", "causal_lm", "lora", "random"),
    ("tiny_gpt2", "classification", "lora", "later"),
    ("tiny_llama", "causal_lm", "lora_sb", "later"),
]


@pytest.mark.parametrize("start", STARTS, ids="-".join)
def test_sound_training_passes(start: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    """Also where LoRA's B is zero and A has no gradient, and where the first sample is empty."""
    model, *kind = start
    case = make_case(request.getfixturevalue(model), *kind, dropout=True)
    assert code(case) is None
    empty = next(seed for seed in range(99) if not drawn(case, 0.1, seed))
    assert code(case, replace(SOUND, sampling_rate=0.1), seed=empty) is None
    options = {"kind": "adaptive", "sigma": 0.8, "rate": 0.4}
    assert code(case, mechanism(1e-3, **options), autocast="bfloat16", optimizer="adamw") is None
    assert code(case, mechanism(1e-3, kind="per_layer", sigma=1.0, max_batch=1)) is None


def test_all_samples_empty_passes(case: Case) -> None:
    assert code(case, replace(SOUND, sampling_rate=1e-9)) is None


def test_texts_of_one_token_are_no_fault(tiny_gpt2: Path) -> None:
    """There is nothing to predict in them, and the only key is attended to whatever the query is."""
    for task in ("causal_lm", "classification"):
        case = make_case(tiny_gpt2, task, "lora")
        short = [{"input_ids": [7], "target": 1} for _ in range(9)]
        mixed = replace(case, features=[*short, *case.features[:1]])
        seed = next(seed for seed in range(99) if (first := drawn(mixed, 0.2, seed)) and 9 not in first)
        assert code(mixed, mechanism(0.5, sigma=1.0, rate=0.2, steps=2, max_batch=1), seed=seed) is None


@pytest.mark.parametrize("pairs", [1, 4, 9])
def test_gradients_that_cancel_are_no_fault(pairs: int, tiny_bert: Path) -> None:
    """One text with a high and a low target, clipped tensor by tensor: what they say of the bias is ``c`` and ``−c``, in every step."""
    case = make_case(tiny_bert, "regression", "head_only")
    text = case.features[0]
    opposite = replace(case, features=[{**text, "target": value} for value in (50.0, -50.0) * pairs])
    assert code(opposite, mechanism(1e-3, kind="per_layer", sigma=1.0, steps=3), lr=1e-9) is None


def test_gradients_that_vanish_beside_others_are_no_fault(tiny_bert: Path) -> None:
    """Beside a huge gradient of B that of A is nothing once both are clipped: a server could send such factors, and ask who has any."""
    case = make_case(tiny_bert, "classification", "lora")
    huge = {"A": 1e10, "B": 1e-30}
    state = State({name: huge.get(name.role, 1.0) * t for name, t in case.state.items()})
    for targets in ([-100] * 6, [-100] * 5 + [1], [1] * 6):
        features = [{**f, "target": target} for f, target in zip(case.features, targets, strict=False)]
        assert code(replace(case, state=state, features=features), mechanism(LEAST_NORM, sigma=1.0)) is None


def test_a_sample_of_broken_texts_alone_is_no_fault(tiny_bert: Path) -> None:
    case = build_case(tiny_bert, "classification", "lora")
    case.adapted.model.get_input_embeddings().weight.data[4] = math.nan
    broken = [{"input_ids": [2, 4, 9], "target": 0} for _ in range(9)]
    mixed = replace(case, features=[*broken, case.features[3]])
    seed = next(seed for seed in range(99) if (first := drawn(mixed, 0.2, seed)) and 9 not in first)
    assert code(mixed, replace(SOUND, sampling_rate=0.2), seed=seed) is None


@pytest.mark.parametrize("count", [1, 2, 5, 16, 1000])
def test_noise_is_too_small_as_rarely_as_promised(count: int) -> None:
    """Against the distribution itself, and never for a typical square."""
    exact = chi2.ppf(NEVER, count)
    assert not too_small(exact * (1 + 1e-6), count)
    assert too_small(exact / 3, count)
    assert not too_small(0.5 * count, count)
