"""A fault of clipping, noise or steps fails with the code of its own check, whatever the data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clients.clipping import CLIPPINGS, FlatClipping, PerLayerClipping
from fedsb.core.state import HEAD
from tests.clients.private_cases import Case, make_case, mechanism
from tests.clients.self_checks.checked import Patch, code


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
