"""A family whose product is no chain goes through layer, gradients, runs, stacks, privacy and export as the others do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import join

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clients.private import sampled_gradients
from fedsb.adapters import SPECS, LowRankLayer, attach, write
from fedsb.adapters.linear import out_in
from fedsb.adapters.merging import merged_copy
from fedsb.adapters.residual import Residual
from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.core.rng import torch_generator
from fedsb.core.state import Name, State, squared_norm, subtract
from fedsb.cost.table import cost_of, costs
from fedsb.models.adapted import AdaptedModel
from fedsb.models.build import forget_models
from fedsb.run.checkpoint import load_checkpoint
from fedsb.runtime.grids import grid_for
from fedsb.server_app import serve
from fedsb.wire.arrays import quantise
from tests.adapters.odd_families import FAMILIES, hadamard
from tests.strategies.federations import Federation, classification, federate
from tests.strategies.private_runs import EXAMPLE, run_privately, small

M, N, RANK, SCALE = 7, 5, 3, 0.6
BASES = {"linear": lambda: nn.Linear(N, M), "conv1d": lambda: Conv1D(M, N)}


# Of each family the one in whose place it runs, which has a method whose rule suits it.
PLACES = {"hadamard": "lora", "own_forward": "lora_sb", "heads": "lora_sb"}
CORE = ["method=fed_sb", "init.kind=orthogonal"]
METHODS = {"hadamard": ["method=fedavg_lora"], "own_forward": CORE, "heads": CORE}
ROUNDS = ["train.lr=0.02", "federation.num_rounds=2"]
Use = Callable[[str], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Use]:
    """Put a family in the place of a method's own, in a process that remembers no model."""

    def put(family: str) -> None:
        forget_models()
        monkeypatch.setitem(SPECS, PLACES[family], FAMILIES[family])

    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    forget_models()
    yield put
    forget_models()


def filled(base: nn.Module, family: str) -> LowRankLayer:
    layer = LowRankLayer(base, FAMILIES[family], RANK, SCALE)
    for i, role in enumerate(layer.spec.factors):
        weight = layer.weight_of(role)
        weight.data = torch.randn(weight.shape, generator=torch_generator(i, "product"))
    return layer


def dense(layer: LowRankLayer, scale: float = SCALE) -> Tensor:
    """Return s times the product in float64, entry by entry."""
    f = {role: layer.weight_of(role).detach().double() for role in layer.spec.factors}
    products = {
        "hadamard": lambda: (f["B1"] @ f["A1"]) * (f["B2"] @ f["A2"]),
        "own_forward": lambda: f["B"] @ f["R"] @ f["A"],
        "heads": lambda: sum(f["t"][i] * f["B"][i] @ f["H"][i] @ f["A"][i] for i in range(2)),
    }
    return scale * products[layer.spec.name]()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("base", BASES)
def test_the_layer_computes_with_the_dense_product(base: str, family: str) -> None:
    layer = filled(BASES[base](), family)
    x = torch.randn(2, 4, N, generator=torch_generator(0, "x"))
    expected = layer.base(x) + x @ dense(layer).float().T
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.delta().double(), dense(layer), rtol=1e-5, atol=1e-5)
    merged = merged_copy(nn.Sequential(layer))[0]
    torch.testing.assert_close(out_in(merged, merged.weight).double(), layer.pristine.double() + dense(layer), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_each_example_alone(family: str) -> None:
    layer = filled(nn.Linear(N, M), family)
    trained = [layer.weight_of(role) for role in layer.spec.learn(1)]
    x, weights = (torch.randn(3, 4, size, generator=torch_generator(size, "x")) for size in (N, M))
    alone = [torch.autograd.grad((layer(x[i : i + 1]).square() * weights[i]).sum(), trained) for i in range(3)]
    with sampled_gradients(layer):
        (layer(x).square() * weights).sum().backward()
        found = [p.grad_sample for p in trained]
    for i, together in enumerate(found):
        torch.testing.assert_close(together, torch.stack([gradients[i] for gradients in alone]), rtol=1e-4, atol=1e-4)


def federated(bert: Path, table: Path, family: str, *more: str) -> Federation:
    return federate([*classification(bert, table), *METHODS[family], *ROUNDS, *more])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_moves_what_it_should_and_measures_its_gap(family: str, use: Use, tiny_bert: Path, tiny_csv: Path) -> None:
    use(family)
    run = federated(tiny_bert, tiny_csv, family)
    cost = cost_of(run.config)
    assert run.payload() == (cost.payload_up, cost.payload_down, cost.payload_one_off)
    gaps = [record.exactness_gap for record in run.records[1:]]
    assert max(gaps) < 1e-5 if family != "hadamard" else min(gaps) > 1e-3
    shapes = run.prepared.adapted.shapes.values()
    sizes = {"hadamard": sum((RANK + 2) * (m + n) for m, n in shapes), "own_forward": RANK**2 * len(shapes)}
    each = {**sizes, "heads": 2 * sizes["own_forward"]}[family]
    assert {exchange.answer.flats["trained"].numel() for exchange in run.grid.rounds()[1]} == {each}


def test_a_forward_of_its_own_trains_as_the_chain_does(use: Use, tiny_bert: Path, tiny_csv: Path) -> None:
    chain = federated(tiny_bert, tiny_csv, "own_forward").kept.states[-1]
    use("own_forward")
    own = federated(tiny_bert, tiny_csv, "own_forward").kept.states[-1]
    assert squared_norm(subtract(own, chain)) < 1e-8 * squared_norm(chain)


def test_what_is_uploaded_is_the_weight_that_was_trained(use: Use, tiny_bert: Path, tiny_csv: Path) -> None:
    """What no upload carries lies in what one does, so the server and the next round hold what the client had."""
    use("heads")
    run = federated(tiny_bert, tiny_csv, "heads")
    adapted, view = run.fresh_model(), run.frozen.view()
    adapted.install(run.kept.states[-1], view)
    with torch.no_grad():
        for i, parameter in enumerate(adapted.trainable().values()):
            parameter += torch.randn(parameter.shape, generator=torch_generator(i, "trained"))
    trained, had = adapted.trained(), weights(adapted)
    upload = adapted.sent(trained, 1)
    said = adapted.encoding_error(trained, 1, quantise(upload, "bfloat16"))
    assert {name.role for name in trained} - {name.role for name in upload} == {"t"}
    adapted.install(upload, view)
    torch.testing.assert_close(weights(adapted), had, rtol=1e-5, atol=1e-6)
    adapted.install(quantise(upload, "bfloat16"), view)
    lost = (weights(adapted) - had).square().sum().sqrt()
    assert said == pytest.approx(float(lost), rel=1e-4)


def weights(adapted: AdaptedModel) -> Tensor:
    """Return all that a round has changed, dense and in float64: every layer's product and the head."""
    products = [dense(layer, adapted.scale).flatten() for layer in adapted.layers.values()]
    return torch.cat([*products, *(t.double().flatten() for t in adapted.copied().values())])


@pytest.mark.parametrize("family", FAMILIES)
def test_clients_side_by_side_end_where_each_ends_alone(family: str, use: Use, tiny_bert: Path, tiny_csv: Path, tmp_path: Path) -> None:
    use(family)
    states = []
    for size in (1, 3):
        overrides = [*classification(tiny_bert, tiny_csv), *METHODS[family], *ROUNDS, f"runtime.stack={size}"]
        config = load(overrides)
        serve(config, grid_for(config, {"overrides": join(overrides), "output": str(tmp_path / str(size))}), tmp_path / str(size))
        states.append(load_checkpoint(tmp_path / str(size) / "checkpoints").state)
    alone, stacked = states
    assert squared_norm(subtract(stacked, alone)) < 1e-10 * squared_norm(alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_private_clients_train_and_pass_their_checks(family: str, use: Use, tiny_bert: Path, tmp_path: Path) -> None:
    use(family)
    run = run_privately(small(tiny_bert, tmp_path, *EXAMPLE, *METHODS[family]), tmp_path / "run")
    assert run.error is None
    assert not any(record.failed for record in run.records)
    assert run.claim.final(simulated=True)["max"] > 0


def test_options_choose_the_shape_of_a_family(use: Use, tiny_bert: Path, tiny_csv: Path) -> None:
    use("hadamard")
    run = federated(tiny_bert, tiny_csv, "hadamard", "+adapter.options.second=4")
    assert {t.shape[1] for name, t in run.kept.states[-1].items() if name.role == "B2"} == {4}


def test_options_of_one_family_hide_no_other_from_the_costs(use: Use, tiny_bert: Path, tiny_csv: Path) -> None:
    use("hadamard")
    both = ["fedavg_lora", "fed_sb"]
    assert set(costs([*classification(tiny_bert, tiny_csv), *METHODS["hadamard"], "+adapter.options.second=4"], both).found) == {*both}


@pytest.mark.parametrize(
    ("family", "given", "said"),
    [
        ("hadamard", {"third": 2}, r"^adapter\.options\.third: the family 'hadamard' has no such option[^;]*; choose from second$"),
        (
            "own_forward",
            {"second": 2},
            r"^adapter\.options\.second: the family 'own_forward' has no such option; it has none; leave adapter\.options\.second out$",
        ),
    ],
)
def test_options_that_a_family_does_not_have_are_told(family: str, given: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        FAMILIES[family].having(given)


def test_a_factor_takes_the_shape_that_comes() -> None:
    """A client of a smaller rank computes with what it was sent."""
    model = nn.Sequential(nn.Linear(N, M))
    layer = attach(model, hadamard(), targets=["0"], rank=RANK, scale=SCALE)["0"]
    narrow = {role: torch.randn(shape) for role, shape in layer.spec.shapes(M, N, 1).items()}
    write(model, State({Name("0", role): t for role, t in narrow.items()}))
    expected = SCALE * (narrow["B1"] @ narrow["A1"]) * (narrow["B2"] @ narrow["A2"])
    torch.testing.assert_close(layer.delta(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["lora", "lora_sb", "abba", "abba_masked", "abba_core"])
@pytest.mark.parametrize("form", ["nothing", "factors", "matrix"])
def test_a_layer_without_values_gives_the_shape_and_the_type_of_one_with_values(dtype: torch.dtype, family: str, form: str) -> None:
    """As spreading a base over devices is tried on; with every form of what stands beside W0."""
    outs = []
    for device in ("cpu", "meta"):
        layer = LowRankLayer(nn.Linear(14, 12, bias=False, dtype=dtype), SPECS[family], 4, 1.0)
        residual = Residual(12, 14)
        residual.add(1, torch.ones(12, 2), torch.ones(2, 14))
        if form != "nothing":
            layer.set_residual(residual if form == "factors" else residual.matrix())
        layer.to(device)
        outs.append(layer(torch.ones(3, 14, dtype=dtype, device=device)))
    assert (outs[0].shape, outs[0].dtype) == (outs[1].shape, outs[1].dtype)
    assert outs[1].is_meta
