"""Each self-check fails with its own code when its fault is planted in the real objects, and none fails on sound training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from scipy.stats import chi2
from torch import Tensor, nn

import clients.private
from clients.clipping import CLIPPINGS, FlatClipping, PerLayerClipping
from clients.mechanism_checks import NEVER, too_small
from clients.private import Mechanism
from fedsb.config.checks_privacy import LEAST_NORM
from fedsb.core.state import HEAD, State
from fedsb.models.fit import OPTIMIZERS
from fedsb.privacy.codes import CODES, SelfCheckFailed
from tests.clients.private_cases import Case, build_case, drawn, fit, make_case, mechanism

SOUND = mechanism(0.5, sigma=1.0, rate=0.4, steps=2, max_batch=4)
Patch = pytest.MonkeyPatch


def code(case: Case, how: Mechanism = SOUND, **options: Any) -> str | None:
    """Return the name of the check that fails, or None."""
    try:
        fit(case, how, check=True, **options)
    except SelfCheckFailed as failed:
        return next(name for name, known in CODES.items() if known is failed.code)
    return None


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Case:
    return build_case(tiny_bert, "classification", "lora")


@pytest.fixture
def case(built: Case) -> Iterator[Case]:
    """A model that may be broken, and is whole again afterwards."""
    yield built
    for layer in built.adapted.layers.values():
        vars(layer).pop("forward", None)
        for part in (layer, layer.A, layer.B):
            part._forward_hooks.clear()
            part._forward_pre_hooks.clear()
    for p in built.adapted.model.parameters():
        p.requires_grad_(any(p is q for q in built.adapted.trainable().values()))


def layer_of(case: Case) -> nn.Module:
    return case.adapted.layers["bert.encoder.layer.1.attention.self.query"]


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


def unused(case: Case) -> None:
    layer = layer_of(case)
    vars(layer)["forward"] = layer.base.forward


def detached(case: Case) -> None:
    layer_of(case).A.register_forward_hook(lambda module, given, out: out.detach())


def silenced(case: Case) -> None:
    layer_of(case).B.register_forward_hook(lambda module, given, out: 0.0 * out)


def frozen(case: Case) -> None:
    layer_of(case).A.weight.requires_grad_(False)


def unused_in_training(case: Case) -> None:
    layer = layer_of(case)
    whole = layer.forward
    vars(layer)["forward"] = lambda x: layer.base(x) if layer.training else whole(x)


@pytest.mark.parametrize("fault", [unused, detached, silenced, frozen, unused_in_training])
def test_dependence(case: Case, fault: Callable[[Case], None]) -> None:
    fault(case)
    assert code(case) == "dependence"


def test_dependence_where_nothing_is_reached(tiny_bert: Path) -> None:
    case = build_case(tiny_bert, "classification", "head_only")
    case.adapted.model.classifier.register_forward_hook(lambda module, given, out: out.detach())
    assert code(case) == "dependence"


def test_a_tensor_without_gradients_fails_even_unwatched(case: Case) -> None:
    detached(case)
    with pytest.raises(SelfCheckFailed, match="does not depend"):
        fit(case, SOUND, check=False)


def owner(base: nn.Parameter) -> Callable[..., torch.optim.Optimizer]:
    base.requires_grad_(True)
    return lambda parameters, train: torch.optim.SGD([base, *parameters], lr=0.1)


def meddler(base: nn.Parameter) -> Callable[..., torch.optim.Optimizer]:
    class Meddler(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step()
            base.data[0, 0] *= 1.000001

    return lambda parameters, train: Meddler(parameters, lr=0.1)


@pytest.mark.parametrize("fault", [owner, meddler])
def test_base(case: Case, monkeypatch: Patch, fault: Callable[[nn.Parameter], Any]) -> None:
    base = layer_of(case).base.weight
    before = base.detach().clone()
    monkeypatch.setitem(OPTIMIZERS, "sgd", fault(base))
    try:
        assert code(case) == "base"
    finally:
        base.data.copy_(before)


class HeadForgotten(FlatClipping):
    def factors(self, norms: Tensor) -> Tensor:
        found = super().factors(norms).clone()
        heads = [i for i, p in enumerate(self.params) if p.shape in {(3, 32), (3,)}]
        found[heads] = 0.0
        return found


class SumForgotten(FlatClipping):
    """Whatever the examples say, the first factor gets noise alone."""

    def clip_and_accumulate(self) -> None:
        super().clip_and_accumulate()
        self.params[0].summed_grad.zero_()


@pytest.mark.parametrize(("steps", "max_batch"), [(2, 4), (6, 32)])
@pytest.mark.parametrize("family", ["lora", "lora_sb"])
def test_clipped_sum_of_many_examples(family: str, steps: int, max_batch: int, tiny_bert: Path, monkeypatch: Patch) -> None:
    """Also of LoRA's A, which has no gradient before B is moved."""
    case = make_case(tiny_bert, "classification", family, "random" if family == "lora" else "weight_svd")
    how = mechanism(0.5, sigma=1.0, rate=0.9, steps=steps, max_batch=max_batch)
    assert code(case, how) is None
    monkeypatch.setitem(CLIPPINGS, "flat", SumForgotten)
    assert code(case, how) == "clipped_sum"


def test_clipped_sum(case: Case, monkeypatch: Patch) -> None:
    assert any(name.role == HEAD for name in case.state)
    assert code(case, mechanism(0.0, sigma=1.0)) == "clipped_sum"
    monkeypatch.setitem(CLIPPINGS, "flat", HeadForgotten)
    assert code(case) == "clipped_sum"


class OnceWithoutNoise(FlatClipping):
    calls = 0

    def add_noise(self) -> None:
        self.calls += 1
        if self.calls != 2:
            return super().add_noise()
        for p in self.params:
            p.grad = p.summed_grad.clone()


class HeadWithoutNoise(FlatClipping):
    def add_noise(self) -> None:
        super().add_noise()
        for p in self.params:
            if p.shape == (3, 32):
                p.grad = p.summed_grad.clone()


class TooLittleNoise(FlatClipping):
    def add_noise(self) -> None:
        self.noise_multiplier *= 0.01
        super().add_noise()
        self.noise_multiplier /= 0.01


class NoNoise(FlatClipping):
    """The mechanism itself does not know of the noise that was charged."""

    share = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.noise_multiplier *= self.share


class HalfTheNoise(NoNoise):
    share = 0.5


class OneStepLess(FlatClipping):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.signal_skip_step(do_skip=True)


NOISE = {
    **dict.fromkeys([OnceWithoutNoise, HeadWithoutNoise, TooLittleNoise, NoNoise, HalfTheNoise], "noise"),
    OneStepLess: "steps",
}


@pytest.mark.parametrize(("fault", "wanted"), NOISE.items())
def test_noise_and_steps(case: Case, monkeypatch: Patch, fault: type[FlatClipping], wanted: str) -> None:
    monkeypatch.setitem(CLIPPINGS, "flat", fault)
    assert code(case) == wanted


class Shuffled(UniformWithReplacementSampler):
    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            yield torch.randperm(self.num_samples, generator=self.generator)[:4].tolist()


class Richer(UniformWithReplacementSampler):
    def __new__(cls, *, sample_rate: float, **options: Any) -> UniformWithReplacementSampler:
        return UniformWithReplacementSampler(sample_rate=2 * sample_rate, **options)


@pytest.mark.parametrize("fault", [Shuffled, Richer])
def test_sampler(case: Case, monkeypatch: Patch, fault: type) -> None:
    monkeypatch.setattr(clients.private, "UniformWithReplacementSampler", fault)
    assert code(case) == "sampler"


@pytest.mark.parametrize("check", [False, True])
def test_examples(case: Case, check: bool) -> None:
    """A layer is handed all tokens of all texts in one dimension."""
    layer = layer_of(case)
    shapes: list[torch.Size] = []
    layer.register_forward_pre_hook(lambda module, given: (shapes.append(given[0].shape), given[0].flatten(0, 1))[1])
    layer.register_forward_hook(lambda module, given, out: out.view(*shapes.pop()[:2], -1))
    with pytest.raises(SelfCheckFailed, match="one example a row"):
        fit(case, SOUND, check=check)


def test_a_node_refuses_layers_that_mix_examples(case: Case) -> None:
    """The server held its own model against that, and a node loads another one; also where nothing else is checked."""
    case.adapted.model.add_module("planted", nn.BatchNorm1d(4))
    try:
        assert code(case) == "examples"
        with pytest.raises(SelfCheckFailed, match="one example a row"):
            fit(case, SOUND, check=False)
    finally:
        del case.adapted.model.planted


class BareBias(FlatClipping):
    """A tensor of three values."""

    def add_noise(self) -> None:
        super().add_noise()
        for p in self.params:
            p.grad = p.summed_grad.clone() if p.numel() < 16 else p.grad


class SameNoise(FlatClipping):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept = self.generator.get_state()

    def add_noise(self) -> None:
        self.generator.set_state(self.kept)
        super().add_noise()


class NoClipping(FlatClipping):
    def factors(self, norms: Tensor) -> Tensor:
        return torch.ones_like(norms)


class HeadUnclipped(FlatClipping):
    def factors(self, norms: Tensor) -> Tensor:
        head = torch.tensor([p.shape in {(3, 32), (3,)} for p in self.params])
        return torch.where(head[:, None], 1.0, super().factors(norms[~head])[:1])


class TenTimesTheBound(FlatClipping):
    def factors(self, norms: Tensor) -> Tensor:
        return (10 * self.max_grad_norm / norms.norm(dim=0)).clamp(max=1.0).expand_as(norms)


class EveryExampleTwice(FlatClipping):
    def clip_and_accumulate(self) -> None:
        super().clip_and_accumulate()
        super().clip_and_accumulate()


class NoRoot(PerLayerClipping):
    """Each tensor has all of C to itself."""

    def factors(self, norms: Tensor) -> Tensor:
        return (self.max_grad_norm / norms.clamp(min=1e-30)).clamp(max=1.0)


class NotFinite(FlatClipping):
    def clip_and_accumulate(self) -> None:
        super().clip_and_accumulate()
        self.params[0].summed_grad[...] = math.nan


PLANTED = {
    BareBias: "noise",
    SameNoise: "noise",
    NoClipping: "bound",
    HeadUnclipped: "bound",
    TenTimesTheBound: "bound",
    EveryExampleTwice: "bound",
    NoRoot: "bound",
    NotFinite: "bound",
}


@pytest.mark.parametrize(("fault", "wanted"), PLANTED.items())
def test_the_mechanism_is_held_whatever_the_data(case: Case, monkeypatch: Patch, fault: type[FlatClipping], wanted: str) -> None:
    """Also where no example is long enough to be clipped, in a single step."""
    kind = "per_layer" if issubclass(fault, PerLayerClipping) else "flat"
    monkeypatch.setitem(CLIPPINGS, kind, fault)
    for max_norm in (0.5, 1e4):
        assert code(case, mechanism(max_norm, kind=kind, sigma=1.0, rate=0.4)) == wanted


def test_what_a_batch_adds_is_held_in_the_round(case: Case, monkeypatch: Patch) -> None:
    """A fault that shows in real examples alone, in a batch that ends no step."""

    class Sometimes(FlatClipping):
        def clip_and_accumulate(self) -> None:
            super().clip_and_accumulate()
            if self.log.examples == 2:
                self.params[0].summed_grad.add_(2.5 * self.max_grad_norm / math.sqrt(self.params[0].numel()))

    monkeypatch.setitem(CLIPPINGS, "flat", Sometimes)
    assert code(case, mechanism(0.5, sigma=1.0, max_batch=2)) == "bound"


@pytest.mark.parametrize("count", [1, 2, 5, 16, 1000])
def test_noise_is_too_small_as_rarely_as_promised(count: int) -> None:
    """Against the distribution itself, and never for a typical square."""
    exact = chi2.ppf(NEVER, count)
    assert not too_small(exact * (1 + 1e-6), count)
    assert too_small(exact / 3, count)
    assert not too_small(0.5 * count, count)
