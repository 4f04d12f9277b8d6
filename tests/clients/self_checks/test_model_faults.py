"""A fault of the model, the base weights, the sample or the examples fails with the code of its own check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import nn

import clients.private
from fedsb.models.fit import OPTIMIZERS
from fedsb.privacy.codes import SelfCheckFailed
from tests.clients.private_cases import Case, build_case, fit
from tests.clients.self_checks.checked import SOUND, Patch, code, layer_of


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
