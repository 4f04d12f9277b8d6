"""What clients compute with after a round, against layers that hold it, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fedsb.adapters.held
from fedsb.adapters import SPECS, LowRankLayer
from fedsb.adapters.exactness import ExactnessMeter
from fedsb.adapters.frozen_part import FrozenPart
from fedsb.adapters.held import HeldWeights
from fedsb.adapters.residual import Residual
from fedsb.core.rng import torch_generator
from fedsb.core.state import HEAD, Name, State
from fedsb.wire.frozen import FrozenLog
from strategies.methods.fedex_lora import FedExReducer

SCALE, RANK = 0.5, 2
WEIGHTS = (3.0, 1.0, 2.0)
SPEC = SPECS["lora"]


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(seed, "test"))


def made_layers(dtype: torch.dtype, hold: str) -> dict[str, LowRankLayer]:
    """Return two layers, one of each kind, whose weights are large beside what is added to them."""
    bases: dict[str, nn.Module] = {"a": nn.Linear(40, 24, bias=False), "b": Conv1D(24, 40)}
    for i, base in enumerate(bases.values()):
        base.weight.data = gaussian(*base.weight.shape, seed=i)  # type: ignore[operator, union-attr]
        base.to(dtype)
    return {name: LowRankLayer(base, SPEC, RANK, SCALE, hold=hold) for name, base in bases.items()}


def upload(layers: dict[str, LowRankLayer], seed: int) -> State:
    """Return factors as a client might send them, small as updates are, and a head."""
    found = {Name("c", HEAD): gaussian(5, seed=seed)}
    for i, (name, layer) in enumerate(layers.items()):
        m, n = layer.shape
        found[Name(name, "A")] = 0.1 * gaussian(RANK, n, seed=seed + 10 + i)
        found[Name(name, "B")] = 0.1 * gaussian(m, RANK, seed=seed + 20 + i)
    return State(found)


def computed_with(layers: dict[str, LowRankLayer], state: State, residuals: dict[str, Residual]) -> dict[str, Tensor]:
    """Return in float64 the weights that layers compute with which hold a state and residuals."""
    found = {}
    for name, layer in layers.items():
        layer.set_residual(residuals.get(name))
        rows = torch.eye(layer.shape[1], dtype=layer.base.weight.dtype)
        weight = layer.pristine.double() + (0 if layer.residual is None else layer.residual)
        # What is computed with it, and not only what the layer says of itself.
        layer.active = False
        torch.testing.assert_close(layer(rows).T.double(), weight, rtol=2e-2, atol=2e-2)
        found[name] = weight + SCALE * state[Name(name, "B")].double() @ state[Name(name, "A")].double()
    return {**found, "head": state[Name("c", HEAD)].double()}


def norm(parts: list[Tensor]) -> float:
    return float(torch.cat([part.flatten() for part in parts]).norm())


NARROW = torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "hold", "least", "most"),
    [
        (torch.float32, "merge", 1e-7, 1e-4),
        (torch.float32, "auto", 0, 1e-6),
        (torch.float32, "factors", 0, 1e-6),
        (torch.float32, "dense", 0, 1e-5),
        (NARROW, "merge", 1e-3, 1.0),
        (NARROW, "auto", 0, 1e-6),
        (NARROW, "dense", 0, 1e-5),
    ],
)
def test_the_held_gap_is_that_of_layers_that_hold_it(
    dtype: torch.dtype, hold: str, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over rounds in which factors become too heavy, for both kinds of layer; from factors alone all rounds would be exact."""
    monkeypatch.setattr(fedsb.adapters.held, "BLOCK", 100)
    layers = made_layers(dtype, hold)
    weights = HeldWeights({name: layer.frozen for name, layer in layers.items()}, seed=0)
    start, log = upload(layers, 1), FrozenLog()
    meter, reducer = ExactnessMeter(SPEC, SCALE, start), FedExReducer(SCALE, lambda state: state.map(Tensor.float))
    for number in range(1, 7):
        uploads = [upload(layers, 100 * number + i) for i in range(len(WEIGHTS))]
        meter.begin(State(), SPEC.uploaded(1))
        reducer.begin(State())
        weights.begin(log.view().residuals)
        for each, weight in zip(uploads, WEIGHTS, strict=True):
            meter.add(each, weight)
            reducer.add(each, weight)
        aggregate = reducer.finish()
        before = log.view().residuals
        trained = [computed_with(layers, each, before) for each in uploads]
        at_rest = computed_with(layers, State({n: 0 * t for n, t in start.items()}), before) | {"head": start[Name("c", HEAD)].double()}
        log.append(aggregate.log)
        factors = meter.measure(aggregate.state.merge(aggregate.log))
        gap = meter.measure_held(aggregate.state, weights, log.view().residuals)

        held = computed_with(layers, aggregate.state, log.view().residuals)
        mean = {key: sum(w * each[key] for w, each in zip(WEIGHTS, trained, strict=True)) / sum(WEIGHTS) for key in held}
        difference = norm([held[key] - mean[key] for key in held])
        # Gram matrices see nothing below 1e-8 of their terms.
        assert gap.difference == pytest.approx(difference, rel=1e-6, abs=1e-8)
        assert gap.update == pytest.approx(norm([mean[key] - at_rest[key] for key in mean]), rel=1e-9)
        assert factors.relative < 1e-6
        assert least < gap.relative < most


def test_of_many_modules_a_sample_is_drawn_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {f"layer{i}": FrozenPart(nn.Linear(5 + i, 4, bias=False)) for i in range(12)}
    assert HeldWeights(shapes, 0).modules == tuple(sorted(shapes))
    assert not HeldWeights(shapes, 0).sampled
    monkeypatch.setattr(fedsb.adapters.held, "MOST_VALUES", 120)
    some = HeldWeights(shapes, 0)
    assert some.sampled
    assert 0 < sum(shapes[name].weight.numel() for name in some.modules) <= 120
    assert HeldWeights(shapes, 0).modules == some.modules
    assert len({HeldWeights(shapes, seed).modules for seed in range(5)}) > 1
    monkeypatch.setattr(fedsb.adapters.held, "MOST_VALUES", 1)
    assert len(HeldWeights(shapes, 0).modules) == 1
