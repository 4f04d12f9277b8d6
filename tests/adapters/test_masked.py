"""What lies under a mask: layers and the gap against ``M ∘ Σ U V`` in float64, in every form in which it is held."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fedsb.adapters.held
from fedsb.adapters import SPECS, LowRankLayer
from fedsb.adapters.exactness import ExactnessMeter
from fedsb.adapters.held import HeldWeights
from fedsb.adapters.masked import Masked, seen
from fedsb.adapters.residual import Residual
from fedsb.adapters.spec import ALWAYS, Role
from fedsb.core.rng import torch_generator
from fedsb.core.state import Name, State
from fedsb.wire.frozen import FrozenLog
from strategies.methods.fedex_lora import FedExReducer

SPEC, RANK, SCALE, WEIGHTS = SPECS["abba_masked"], 4, 0.5, (3.0, 1.0, 2.0)
PAIR = ("B2", "A2")


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(seed, "test"))


def made_layers(dtype: torch.dtype, hold: str) -> dict[str, LowRankLayer]:
    bases: dict[str, nn.Module] = {"a": nn.Linear(60, 44, bias=False), "b": Conv1D(44, 60)}
    for i, base in enumerate(bases.values()):
        base.weight.data = gaussian(*base.weight.shape, seed=i)  # type: ignore[operator, union-attr]
        base.to(dtype)
    return {name: LowRankLayer(base, SPEC, RANK, SCALE, hold=hold) for name, base in bases.items()}


def drawn(roles: tuple[str, ...], seed: int) -> State:
    shapes = SPEC.shapes(44, 60, RANK)
    return State({Name(n, role): 0.3 * gaussian(*shapes[role], seed=seed + i) for i, n in enumerate("ab") for role in roles})


def mask_of(held: State, name: str) -> Tensor:
    return held[Name(name, "B1")].double() @ held[Name(name, "A1")].double()


def product(held: State, state: State, name: str) -> Tensor:
    return SCALE * mask_of(held, name) * (state[Name(name, "B2")].double() @ state[Name(name, "A2")].double())


def computed_with(layers: dict[str, LowRankLayer], residuals: dict[str, Residual]) -> dict[str, Tensor]:
    """Return the weights beside the adapters, as the layers compute with them."""
    found = {}
    for name, layer in layers.items():
        layer.active = False
        layer.set_residual(residuals.get(name))
        found[name] = layer.pristine.double() + (0 if layer.residual is None else layer.residual)
        rows = torch.eye(layer.shape[1], dtype=layer.base.weight.dtype)
        torch.testing.assert_close(layer(rows).T.double(), found[name], rtol=2e-2, atol=2e-2)
    return found


@pytest.mark.parametrize(
    ("dtype", "hold", "most"),
    [
        (torch.float32, "merge", 1e-4),
        (torch.float32, "factors", 1e-5),
        (torch.bfloat16, "auto", 1e-5),
        (torch.bfloat16, "dense", 1e-5),
        (torch.bfloat16, "merge", 10.0),
    ],
)
def test_clients_compute_with_the_mean_under_the_mask(dtype: torch.dtype, hold: str, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first round, in which factors are light, to where the log's own outweigh a matrix, past where the masked ones do."""
    monkeypatch.setattr(fedsb.adapters.held, "BLOCK", 100)
    layers, held, log = made_layers(dtype, hold), drawn(("B1", "A1"), 7), FrozenLog()
    log.append(held)
    weights = HeldWeights({name: layer.frozen for name, layer in layers.items()}, seed=0)
    meter = ExactnessMeter(SPEC, SCALE, State())
    reducer = FedExReducer(SCALE, lambda state: state.map(Tensor.float), pair=PAIR)
    forms, added = set(), {name: torch.zeros(44, 60, dtype=torch.float64) for name in layers}
    for number in range(1, 9):
        uploads = [drawn(PAIR, 100 * number + i) for i in range(len(WEIGHTS))]
        before = seen(SPEC, log.view().residuals, log.view().basis)
        meter.begin(held, PAIR)
        reducer.begin(State())
        weights.begin(before)
        at_first = computed_with(layers, dict(before))
        for each, weight in zip(uploads, WEIGHTS, strict=True):
            meter.add(each, weight)
            reducer.add(each, weight)
        aggregate = reducer.finish()
        log.append(aggregate.log)
        assert meter.measure(held.merge(aggregate.state).merge(aggregate.log)).relative < 1e-6

        after = seen(SPEC, log.view().residuals, log.view().basis)
        now = computed_with(layers, dict(after))
        gap = meter.measure_held(held.merge(aggregate.state), weights, after)
        apart = update = 0.0
        for name in layers:
            mean = sum(w * product(held, each, name) for w, each in zip(WEIGHTS, uploads, strict=True)) / sum(WEIGHTS)
            added[name] += mean - product(held, aggregate.state, name)
            apart += float((now[name] + product(held, aggregate.state, name) - at_first[name] - mean).square().sum())
            update += float(mean.square().sum())
            if hold != "merge" or dtype == torch.float32:
                torch.testing.assert_close(now[name], layers[name].pristine.double() + added[name], rtol=1e-5, atol=1e-5)
            forms.add((log.view().residuals[name].dense is None, layers[name].frozen.terms is None))
        assert gap.difference == pytest.approx(apart**0.5, rel=1e-5, abs=1e-7)
        assert gap.update == pytest.approx(update**0.5, rel=1e-9)
        assert gap.relative < most
    rounded = hold == "merge" and dtype == torch.bfloat16
    assert forms >= ({(True, True)} if rounded else {(True, False), (True, True)})


def test_what_travels_has_the_rank_of_the_second_pair_and_outweighs_its_own_matrix_alone() -> None:
    """Rank 6 a round against the 25.4 of a 44 x 60 matrix: five rounds make a matrix, and it is not under the mask yet."""
    held, log = drawn(("B1", "A1"), 7), FrozenLog()
    log.append(held)
    for number in range(1, 6):
        log.append(State({Name("a", "U"): gaussian(44, 6, seed=number), Name("a", "V"): gaussian(6, 60, seed=50 + number)}))
    light, whole = log.bundle(2), log.bundle(1)
    assert light is not None
    assert whole is not None
    assert {name.role for name in light.state} == {f"{role}@{v}" for role in "UV" for v in range(3, 7)}
    bare = log.view().residuals["a"].matrix()
    assert torch.equal(whole.state[Name("a", "D@6")], bare)
    found = seen(SPEC, log.view().residuals, held)["a"].matrix()
    torch.testing.assert_close(found.double(), mask_of(held, "a") * bare.double(), rtol=1e-5, atol=1e-6)


def test_a_matrix_under_a_mask_is_not_made_anew_for_every_client() -> None:
    residual = Residual(44, 60)
    residual.add(1, gaussian(44, 30, seed=1), gaussian(30, 60, seed=2))
    residual.token = "x"
    held, layer = drawn(("B1", "A1"), 7), made_layers(torch.float32, "dense")["a"]
    layer.set_residual(seen(SPEC, {"a": residual}, held)["a"])
    first = layer.frozen._beside[0]
    layer.set_residual(seen(SPEC, {"a": residual}, held)["a"])
    assert layer.frozen._beside[0] is first


def test_nothing_is_under_a_mask_that_could_move() -> None:
    assert isinstance(seen(SPEC, {"a": Residual(44, 60)}, drawn(("B1", "A1"), 7))["a"], Masked)
    plain = {"a": Residual(44, 60)}
    assert seen(SPECS["abba"], plain, State()) is plain
    abba = SPECS["abba"]
    with pytest.raises(ValueError, match="what masks W0's gain rests"):
        type(abba)("moving", (Role("B1", learns=ALWAYS), Role("A1"), Role("B2"), Role("A2")), abba.starts, mask=("B1", "A1"))
