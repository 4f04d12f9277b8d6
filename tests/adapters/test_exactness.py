"""The exactness gap from factors against the dense one in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fedsb.adapters.uploads
from fedsb.adapters import SPECS, attach, write
from fedsb.adapters.exactness import ExactnessMeter, Gap, encoding_error
from fedsb.adapters.low_rank import low_rank_squared_norm
from fedsb.core.blocks import Sight
from fedsb.core.rng import torch_generator
from fedsb.core.state import HEAD, Layout, Name, State
from fedsb.wire.arrays import quantise

law = settings(max_examples=25, deadline=None)
SHAPES = {"wide": (4, 9), "tall": (9, 4)}
RANK = 2
seeds = st.integers(0, 2**32)
weightings = st.lists(st.integers(1, 300).map(float), min_size=1, max_size=4)


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(seed, "test"))


def factors(family: str, roles: tuple[str, ...], seed: int) -> State:
    """Return factors of every module and a head."""
    spec = SPECS[family]
    shapes = {Name(module, role): spec.shape(role, m, n, RANK) for module, (m, n) in SHAPES.items() for role in roles}
    return State({name: gaussian(*shape, seed=seed + i) for i, (name, shape) in enumerate({**shapes, Name("c", HEAD): (3,)}.items())})


def dense(family: str, state: State, basis: State, scale: float) -> dict[str, Tensor]:
    """Return ``s B [R] A`` of every module and the head, in float64."""
    found = {"head": state[Name("c", HEAD)].double()}
    for module in SHAPES:
        product: Tensor = torch.tensor(scale, dtype=torch.float64)
        for role in SPECS[family].factors:
            factor = state.get(Name(module, role), basis.get(Name(module, role)))
            assert factor is not None
            product = product * factor.double() if product.ndim == 0 else product @ factor.double()
        found[module] = product
    return found


def norm(parts: dict[str, Tensor]) -> float:
    return float(torch.stack([t.norm() for t in parts.values()]).norm())


@pytest.mark.parametrize("family", ["lora", "lora_sb"])
@law
@given(seed=seeds, weights=weightings, with_residual=st.booleans(), scale=st.sampled_from([1.0, 0.4]))
def test_the_gap_is_the_dense_one(family: str, seed: int, weights: list[float], with_residual: bool, scale: float) -> None:
    spec = SPECS[family]
    basis = factors(family, spec.in_log, seed).pick(*spec.in_log)
    start, held = (factors(family, spec.in_state, seed + k) for k in (100, 200))
    uploads = [factors(family, spec.in_state, seed + 1000 * (i + 1)) for i in range(len(weights))]
    residual = State()
    if with_residual and family == "lora":
        pairs = {module: (gaussian(m, 3, seed=seed), gaussian(3, n, seed=seed + 1)) for module, (m, n) in SHAPES.items()}
        residual = State({Name(module, role): t for module, pair in pairs.items() for role, t in zip("UV", pair, strict=True)})
    meter = ExactnessMeter(spec, scale, start)
    meter.begin(basis, spec.uploaded(1))
    for upload, weight in zip(uploads, weights, strict=True):
        meter.add(upload, weight)
    gap = meter.measure(basis.merge(held).merge(residual))

    products = [dense(family, upload, basis, scale) for upload in uploads]
    wanted = {key: sum(w / sum(weights) * p[key] for w, p in zip(weights, products, strict=True)) for key in products[0]}
    given_out = dense(family, held, basis, scale)
    for module in residual.modules:
        given_out[module] = given_out[module] + residual[Name(module, "U")].double() @ residual[Name(module, "V")].double()
    moved = {**wanted, "head": wanted["head"] - start[Name("c", HEAD)].double()}
    assert gap.difference == pytest.approx(norm({key: given_out[key] - wanted[key] for key in wanted}), rel=1e-9)
    assert gap.update == pytest.approx(norm(moved), rel=1e-9)
    assert gap.relative == pytest.approx(gap.difference / gap.update)


@pytest.mark.parametrize("family", ["lora", "lora_sb"])
def test_a_round_forgets_the_round_before_and_keeps_the_first_head(family: str) -> None:
    spec = SPECS[family]
    basis = factors(family, spec.in_log, 1).pick(*spec.in_log)
    start, earlier, upload = (factors(family, spec.in_state, k) for k in (2, 3, 4))
    twice, once = (ExactnessMeter(spec, 1.0, start) for _ in range(2))
    twice.begin(basis, spec.uploaded(1))
    twice.add(earlier, 5.0)
    twice.measure(basis.merge(earlier))
    for meter in (twice, once):
        meter.begin(basis, spec.uploaded(1))
        meter.add(upload, 3.0)
    assert twice.measure(basis.merge(earlier)) == once.measure(basis.merge(earlier))


@pytest.mark.parametrize("family", ["lora", "lora_sb"])
def test_one_client_that_gets_back_what_it_sent_has_no_gap(family: str) -> None:
    spec = SPECS[family]
    upload = factors(family, spec.in_state, 2)
    meter = ExactnessMeter(spec, 2.0, factors(family, spec.in_state, 3))
    basis = factors(family, spec.in_log, 1).pick(*spec.in_log)
    meter.begin(basis, spec.uploaded(1))
    meter.add(upload, 7.0)
    # ‖x − x‖² from Gram matrices in float64 is rounding of ‖x‖², so its root is about 1e-8 of ‖x‖.
    assert meter.measure(basis.merge(upload)).relative <= 1e-7


def test_where_nothing_moves_there_is_no_gap() -> None:
    assert Gap(0.0, 0.0).relative == 0.0
    assert Gap(1.0, 4.0).relative == 0.25


@pytest.mark.parametrize("family", ["lora", "lora_sb"])
@law
@given(seed=seeds)
def test_what_rounding_takes_from_an_upload_is_the_dense_difference(family: str, seed: int) -> None:
    spec = SPECS[family]
    basis = factors(family, spec.in_log, seed).pick(*spec.in_log)
    upload = factors(family, spec.in_state, seed + 50)
    decoded = quantise(upload, "bfloat16")
    sides = dense(family, upload, basis, 0.4), dense(family, decoded, basis, 0.4)
    lost = encoding_error(upload, decoded, spec, 0.4, basis)
    assert lost == pytest.approx(norm({key: t - sides[1][key] for key, t in sides[0].items()}), rel=1e-6)


def test_what_the_wire_took_is_added_to_the_difference() -> None:
    spec, start, upload = SPECS["lora"], factors("lora", ("A", "B"), 1), factors("lora", ("A", "B"), 2)
    meter = ExactnessMeter(spec, 1.0, start)
    meter.begin(State(), spec.uploaded(1))
    meter.add(upload, 1.0)
    plain, told = meter.measure(start), meter.measure(start, lost=0.5)
    assert told == Gap(plain.difference + 0.5, plain.update)


@law
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), seeds)
def test_the_norm_of_a_sum_of_products_is_the_dense_one(ranks: list[int], seed: int) -> None:
    terms = [(gaussian(6, rank, seed=seed + i), gaussian(rank, 11, seed=seed - i)) for i, rank in enumerate(ranks)]
    whole = sum(left.double() @ right.double() for left, right in terms)
    assert low_rank_squared_norm(terms) == pytest.approx(float(whole.square().sum()), rel=1e-9)


class Alone(NamedTuple):
    """A client's upload and weight, of a rank of its own."""

    rank: int
    upload: State
    weight: float


def blocks(state: State, rank: int) -> State:
    """Return the leading blocks of factors: what a client of a smaller rank holds."""
    cut = {"B": (slice(None), slice(rank)), "R": (slice(rank), slice(rank)), "A": (slice(rank), slice(None))}
    return State({name: t[cut[name.role]] if name.role in cut else t for name, t in state.items()})


def alone(family: str, uploaded: tuple[str, ...], seed: int, weights: list[float]) -> list[Alone]:
    ranks = [1 + (seed + i) % RANK for i in range(len(weights))]
    made = [blocks(factors(family, uploaded, seed + 1000 * (i + 1)), rank) for i, rank in enumerate(ranks)]
    return [Alone(*each) for each in zip(ranks, made, weights, strict=True)]


def sight(family: str, rank: int) -> Sight:
    shapes = {Name(module, role): t for module, (m, n) in SHAPES.items() for role, t in SPECS[family].shapes(m, n, rank).items()}
    return Sight(Layout(tuple(sorted(shapes.items()))))


@law
@given(seed=seeds, weights=weightings, scale=st.sampled_from([1.0, 0.4]))
def test_the_gap_of_one_factor_in_blocks_is_that_of_the_clients_own_weights(seed: int, weights: list[float], scale: float) -> None:
    """From the dense products of everybody's factors at its own rank: beyond its block a client adds nothing."""
    spec, held = SPECS["lora_sb"], factors("lora_sb", ("R",), seed + 200)
    basis, current = factors("lora_sb", ("B", "A"), seed).pick("B", "A"), factors("lora_sb", ("R",), seed + 100)
    clients = alone("lora_sb", ("R",), seed, weights)
    meter = ExactnessMeter(spec, scale, current)
    meter.begin(basis.merge(current), ("R",))
    for each in clients:
        meter.add(each.upload, each.weight, sight("lora_sb", each.rank))
    wanted: dict[str, Tensor] = {"head": sum(e.weight * e.upload[Name("c", HEAD)].double() for e in clients) / sum(weights)}
    for module, (m, n) in SHAPES.items():
        name, wanted[module] = Name(module, "R"), torch.zeros(m, n, dtype=torch.float64)
        for each in clients:
            b, a = (blocks(basis.pick("B", "A"), each.rank)[Name(module, role)].double() for role in ("B", "A"))
            wanted[module] += scale * each.weight / sum(weights) * b @ each.upload[name].double() @ a
    given_out = dense("lora_sb", held, basis, scale)
    gap = meter.measure(basis.merge(held))
    moved = {**wanted, "head": wanted["head"] - current[Name("c", HEAD)].double()}
    assert gap.difference == pytest.approx(norm({key: given_out[key] - wanted[key] for key in wanted}), rel=1e-9)
    assert gap.update == pytest.approx(norm(moved), rel=1e-9)


@law
@given(seed=seeds, weights=weightings)
def test_the_gap_of_several_factors_in_blocks_is_that_of_the_mean_product(seed: int, weights: list[float]) -> None:
    """``Σ w_i s B_i R_i A_i`` where A comes from the log, of which each holds the rows of its rank."""
    spec, held = SPECS["lora_sb"], factors("lora_sb", ("B", "R"), seed + 200)
    basis, current = factors("lora_sb", ("A",), seed).pick("A"), factors("lora_sb", ("B", "R"), seed + 100)
    clients = alone("lora_sb", ("B", "R"), seed, weights)
    meter = ExactnessMeter(spec, 0.4, current)
    meter.begin(basis.merge(current), ("B", "R"))
    for each in clients:
        meter.add(each.upload, each.weight, sight("lora_sb", each.rank))
    products = [dense("lora_sb", each.upload, blocks(basis, each.rank), 0.4) for each in clients]
    wanted = {key: sum(w / sum(weights) * p[key] for w, p in zip(weights, products, strict=True)) for key in products[0]}
    given_out = dense("lora_sb", held, basis, 0.4)
    gap = meter.measure(basis.merge(held))
    assert gap.difference == pytest.approx(norm({key: given_out[key] - wanted[key] for key in wanted}), rel=1e-9)


def test_a_layer_takes_frozen_factors_of_a_smaller_rank_and_no_others() -> None:
    base = nn.Linear(9, 4)
    [layer] = attach(nn.Sequential(base), SPECS["lora_sb"], targets=["0"], rank=3, scale=0.5).values()
    for rank in (2, 3, 1):
        state = {role: gaussian(*shape, seed=rank) for role, shape in SPECS["lora_sb"].shapes(4, 9, rank).items()}
        write(nn.Sequential(layer), State({Name("0", role): t for role, t in state.items()}))
        x = gaussian(5, 9, seed=0)
        wanted = x @ base.weight.T + base.bias + 0.5 * x @ (state["B"] @ state["R"] @ state["A"]).T
        torch.testing.assert_close(layer(x), wanted)
    layer.hold("B", None)
    assert layer.weight_of("B").shape == (4, 3)
    for wrong in ((4, 4), (5, 3), (4,)):
        with pytest.raises(ValueError, match=r"^B is \([\d, ]+\), expected \(4, 3\), or that of a smaller rank$"):
            layer.hold("B", torch.zeros(wrong))


@pytest.mark.parametrize("late", [0, 3], ids=["from the first on", "after some"])
def test_of_many_uploads_the_gap_is_estimated_with_its_error(late: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within four standard errors, which are of some percent at these sizes; and the same every time."""
    held = State({Name(f"layer{i}", role): gaussian(*shape, seed=i) for i in range(6) for role, shape in (("B", (30, 3)), ("A", (3, 20)))})
    uploads = [held.map(lambda t, seed=seed: t + 0.1 * gaussian(*t.shape, seed=seed)) for seed in range(50, 57)]  # type: ignore[misc]

    def measured() -> Gap:
        meter = ExactnessMeter(SPECS["lora"], 0.5, held)
        meter.begin(State(), ("A", "B"))
        for i, upload in enumerate(uploads):
            meter.add(upload, 1.0 + i)
        return meter.measure(held)

    exact = measured()
    work = 6 * (30 + 20) * (2 * 3 * late) ** 2
    monkeypatch.setattr(fedsb.adapters.uploads, "EXACT_WORK", work)
    estimate = measured()
    assert (exact.error, estimate) == (0.0, measured())
    assert 0.001 < estimate.error < 0.1
    assert abs(estimate.relative / exact.relative - 1) < 4 * estimate.error
    assert estimate.update == pytest.approx(exact.update, rel=0.2)


@pytest.mark.parametrize("work", [2**36, 0], ids=["exact", "by probes"])
def test_what_a_start_took_out_of_w0_was_not_learnt(work: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of W0 a hundred times what moved would make a gap of a tenth one of a thousandth."""
    monkeypatch.setattr(fedsb.adapters.uploads, "EXACT_WORK", work)
    first = State({Name("a", "B"): 10 * gaussian(300, 3, seed=1), Name("a", "A"): 10 * gaussian(3, 200, seed=2)})
    uploads = [first.map(lambda t, seed=seed: t + 0.1 * gaussian(*t.shape, seed=seed)) for seed in (3, 4)]  # type: ignore[misc]
    gaps = []
    for shift in (State(), SPECS["lora"].shift(first, 0.5)):
        meter = ExactnessMeter(SPECS["lora"], 0.5, shift)
        meter.begin(State(), ("A", "B"))
        for upload in uploads:
            meter.add(upload, 1.0)
        gaps.append(meter.measure(uploads[0]))
    products = [each[Name("a", "B")].double() @ each[Name("a", "A")].double() for each in (*uploads, first)]
    moved = 0.5 * float(((products[0] + products[1]) / 2 - products[2]).norm())
    assert gaps[0].difference == gaps[1].difference
    assert gaps[1].update == pytest.approx(moved, rel=1e-9 if work else 0.2)
    assert gaps[0].update > 50 * moved


def test_probes_see_a_difference_of_rounding_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedsb.adapters.uploads, "EXACT_WORK", 0)
    one = State({Name("a", "B"): gaussian(30, 3, seed=1), Name("a", "A"): gaussian(3, 20, seed=2)})
    meter = ExactnessMeter(SPECS["lora"], 0.5, one)
    meter.begin(State(), ("A", "B"))
    for _ in range(3):
        meter.add(one, 1.0)
    assert meter.measure(one).relative < 1e-14
    assert 1e-9 < meter.measure(one.map(lambda t: t * (1 + 1e-7))).relative < 1e-6
