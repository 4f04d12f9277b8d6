"""Laws of the starts, held against dense float64 SVDs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsb.adapters import SPECS
from fedsb.adapters.starts import CORES, SIDES, Sketch, core, orthogonal, random_core, random_lora, sign_start, weight_svd
from fedsb.core.rng import torch_generator
from fedsb.core.state import Name, State, WeightedSum, sha256

SHAPES = {"a": (12, 30), "b": (30, 12), "c": (9, 9)}
sizes = st.integers(2, 24)
seeds = st.integers(0, 2**32)
law = settings(max_examples=50, deadline=None)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    """Return a float64 Gaussian from a stream of the test's own."""
    return torch.randn(*shape, generator=torch_generator(seed, "test"), dtype=torch.float64)


def weights(seed: int = 0) -> dict[str, Tensor]:
    return {module: gaussian(*shape, seed=seed).float() for module, shape in SHAPES.items()}


def rank_error(columns: Tensor) -> float:
    """Largest entry of ``|Cᵀ C − I|`` in float64."""
    columns = columns.double()
    return float((columns.T @ columns - torch.eye(columns.shape[1])).abs().max())


def assert_orthonormal(start: State) -> None:
    for name, t in start.pick("A", "B").items():
        assert rank_error(t if name.role == "B" else t.T) <= 1e-6
        assert t.dtype == torch.float32


def projector(columns: Tensor) -> Tensor:
    return columns.double() @ columns.double().T


def run_sketch(sketch: Sketch, clients: list[dict[str, Tensor]], client_weights: list[float]) -> State:
    """Play all exchanges; clients hold dense gradients and answer in float32."""
    shapes = {module: (g.shape[0], g.shape[1]) for module, g in clients[0].items()}
    probes = sketch.probes(shapes)
    for exchange in sketch.exchanges:
        total = WeightedSum()
        for gradients, weight in zip(clients, client_weights, strict=True):
            answer = {
                Name(name.module, "Y" if SIDES[exchange] == "right" else "Z"): (
                    gradients[name.module] if SIDES[exchange] == "right" else gradients[name.module].T
                ).float()
                @ probe
                for name, probe in probes.items()
            }
            total.add(State(answer), weight)
        if exchange == "core":
            return sketch.finish(total.mean(), probes)
        probes = sketch.basis(total.mean())
    raise AssertionError


DATA_FREE = {(spec.name, kind): start for spec in SPECS.values() for kind, start in spec.starts.items() if start is not None}


@pytest.mark.parametrize(("family", "kind"), DATA_FREE)
def test_data_free_start_is_a_function_of_its_seed(family: str, kind: str) -> None:
    torch.manual_seed(1)
    first = DATA_FREE[family, kind](weights(), 2, 7)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = DATA_FREE[family, kind](weights(), 2, 7)
    assert torch.equal(before, torch.get_rng_state())
    assert sha256(first) == sha256(second)


@pytest.mark.parametrize(("family", "kind"), DATA_FREE)
def test_data_free_start_has_the_factors_of_its_family(family: str, kind: str) -> None:
    spec = SPECS[family]
    start = DATA_FREE[family, kind](weights(), 2, 7)
    expected = {
        Name(module, role): spec.shape(role, *shape, 2)
        for module, shape in SHAPES.items()
        for role in spec.factors
        if role not in spec.folded
    }
    assert {name: tuple(t.shape) for name, t in start.items()} == expected
    zero = {name.role for name, t in start.items() if not t.any()}
    if kind in spec.shifting:  # its product is taken out of W0
        assert not zero
        return
    assert len(zero) == 1  # so that the run starts at W0, and every other factor has a gradient or lets one through
    assert zero <= set(spec.ever_learn)


@pytest.mark.parametrize(("family", "kind"), DATA_FREE)
def test_layers_of_one_shape_start_from_factors_of_their_own(family: str, kind: str) -> None:
    """A seed that is set anew for each layer would give all layers of one shape the same frozen A."""
    twins = {module: gaussian(12, 30, seed=i).float() for i, module in enumerate(("x", "y", "z"))}
    start = DATA_FREE[family, kind](twins, 2, 7)
    drawn = {name: t for name, t in start.items() if t.any()}
    assert drawn
    for name, t in drawn.items():
        assert not any(torch.equal(t, drawn[Name(other, name.role)]) for other in twins if other != name.module)


def test_a_module_draws_from_a_stream_of_its_own() -> None:
    alone = random_lora({"b": SHAPES["b"]}, 3, 0)
    together = random_lora(SHAPES, 3, 0)
    assert torch.equal(alone[Name("b", "A")], together[Name("b", "A")])


def test_random_lora_is_uniform_within_peft_bounds() -> None:
    """Kaiming-uniform with a = √5: bound √(6 / ((1 + 5) n)) = 1/√n, variance 1/(3n)."""
    a = random_lora({"x": (8, 400)}, 64, 0)[Name("x", "A")]
    assert 0.99 / 20 < a.abs().max() <= 1 / 20
    assert float(a.double().var()) == pytest.approx(1 / 1200, rel=0.03)


def test_random_core_has_unit_rows_and_columns_on_average() -> None:
    start = random_core({"x": (300, 500)}, 32, 0)
    assert float(start[Name("x", "A")].square().sum(1).mean()) == pytest.approx(1, rel=0.05)
    assert float(start[Name("x", "B")].square().sum(0).mean()) == pytest.approx(1, rel=0.05)


@law
@given(m=sizes, n=sizes, seed=seeds, data=st.data())
def test_orthonormal_starts_are_orthonormal_in_float32(m: int, n: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    assert_orthonormal(orthogonal({"x": (m, n)}, rank, seed))
    assert_orthonormal(weight_svd({"x": gaussian(m, n, seed=seed).float()}, rank, seed))
    assert_orthonormal(sign_start(State({Name("x", "G"): gaussian(m, n, seed=seed).float()}), rank, seed))


@law
@given(m=sizes, n=sizes, seed=seeds, data=st.data())
def test_weight_svd_captures_what_the_dense_svd_does(m: int, n: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    weight = gaussian(m, n, seed=seed).float()
    start = weight_svd({"x": weight}, rank, seed)
    captured = start[Name("x", "B")].T.double() @ weight.double() @ start[Name("x", "A")].T.double()
    best = torch.linalg.svdvals(weight.double())[:rank]
    assert torch.allclose(captured, torch.diag(captured.diagonal()), atol=1e-5 * float(best[0]))
    assert torch.allclose(captured.diagonal(), best, rtol=1e-5)


def test_weight_svd_of_a_large_matrix_finds_the_known_vectors() -> None:
    """Above the size limit of the exact route: singular values 10, 9, …, 5 over noise whose largest is below 0.7."""
    m, n, rank = 1040, 1100, 6
    u, v = (torch.linalg.qr(gaussian(size, rank, seed=size))[0] for size in (m, n))
    weight = (u * torch.arange(10.0, 4.0, -1.0)) @ v.T + 0.01 * gaussian(m, n)
    start = weight_svd({"x": weight.float()}, rank, 0)
    assert_orthonormal(start)
    b, a = start[Name("x", "B")].double(), start[Name("x", "A")].double()
    best = torch.linalg.svdvals(weight)[:rank]
    assert torch.allclose(b.T @ weight @ a.T, torch.diag(best), atol=1e-3)


@law
@given(
    m=sizes,
    n=sizes,
    seed=seeds,
    oversample=st.integers(0, 8),
    power=st.integers(0, 2),
    shares=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    data=st.data(),
)
def test_sketch_equals_dense_svd_where_rank_allows(
    m: int, n: int, seed: int, oversample: int, power: int, shares: list[int], data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    true_rank = data.draw(st.integers(1, rank))
    left, right = gaussian(len(shares), m, true_rank, seed=seed), gaussian(true_rank, n, seed=seed + 1)
    clients = [{"x": (one @ right)} for one in left]
    mean = sum(w * c["x"] for w, c in zip(shares, clients, strict=True)) / sum(shares)
    found = run_sketch(Sketch(rank, oversample, power, seed), clients, [float(w) for w in shares])
    assert_orthonormal(found)
    b, a, values = (found[Name("x", role)].double() for role in ("B", "A", "S"))
    assert float((b.T @ mean @ a.T).square().sum()) >= (1 - 1e-6) * float(mean.square().sum())
    u, s, vt = torch.linalg.svd(mean)
    assert torch.allclose(values[:true_rank], s[:true_rank], atol=1e-5 * float(s[0]))
    if s[true_rank - 1] > 1e-2 * s[0]:  # the vectors of a value near the rounding are not determined
        assert torch.allclose(projector(b[:, :true_rank]), projector(u[:, :true_rank]), atol=1e-4)
        assert torch.allclose(projector(a[:true_rank].T), projector(vt[:true_rank].T), atol=1e-4)


@law
@given(m=sizes, n=sizes, seed=seeds)
def test_finish_is_the_same_in_any_basis_of_the_subspace(m: int, n: int, seed: int) -> None:
    """Signs and rotations of Q cancel: the factors belong to G, not to the QR routine that found its range."""
    rank = min(m, n, 3)
    gradient = gaussian(m, n, seed=seed)
    q, turn = torch.linalg.qr(gaussian(m, rank, seed=seed + 1))[0], torch.linalg.qr(gaussian(rank, rank, seed=seed + 2))[0]
    sketch = Sketch(rank, 0, 0, 0)
    one, other = (sketch.finish(State({Name("x", "Z"): gradient.T @ basis}), State({Name("x", "Q"): basis})) for basis in (q, q @ turn))
    b, s = one[Name("x", "B")], one[Name("x", "S")].double()
    largest = b.abs().topk(min(2, m), dim=0).values
    gaps = torch.cat([s[:-1] - s[1:], s[-1:]])
    if gaps.min() > 1e-3 * s[0] and (largest[0] - largest[-1]).min() > 1e-3:
        assert torch.allclose(b, other[Name("x", "B")], atol=1e-4)
        assert torch.allclose(one[Name("x", "A")], other[Name("x", "A")], atol=1e-4)
    assert (b.gather(0, b.abs().argmax(0, keepdim=True)) > 0).all()


def test_sketch_of_a_zero_gradient_is_orthonormal() -> None:
    zeros = {module: torch.zeros(shape) for module, shape in SHAPES.items()}
    start = run_sketch(Sketch(4, 3, 1, 0), [zeros], [1.0])
    assert_orthonormal(start)
    assert not any(t.any() for t in start.pick("S").values())


def test_exchanges_alternate_and_the_width_is_capped() -> None:
    sketch = Sketch(rank=4, oversample=8, power_iterations=2, seed=3)
    assert sketch.exchanges == ("range", "corange", "range", "corange", "range", "core")
    assert [sketch.width(*shape) for shape in SHAPES.values()] == [12, 12, 9]
    assert {name: tuple(t.shape) for name, t in sketch.probes(SHAPES).items()} == {
        Name("a", "P"): (30, 12),
        Name("b", "P"): (12, 12),
        Name("c", "P"): (9, 9),
    }


def test_omega_is_the_same_wherever_it_is_drawn() -> None:
    sketch = Sketch(4, 2, 0, 5)
    before = torch.get_rng_state()
    assert torch.equal(sketch.omega("a", 30, 6), Sketch(4, 2, 1, 5).probes(SHAPES)[Name("a", "P")])
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(sketch.omega("a", 30, 6), sketch.omega("b", 30, 6))


@law
@given(step=st.floats(1e-4, 10), scale=st.floats(0.1, 16), seed=seeds)
def test_spectral_core_is_one_gradient_step(step: float, scale: float, seed: int) -> None:
    """``s B R0 A = −η G_r`` whatever the scale."""
    gradient = gaussian(14, 9, seed=seed)
    start = run_sketch(Sketch(3, 6, 1, seed), [{"x": gradient}], [1.0])
    r0 = core(start, "spectral", step=step, scale=scale)[Name("x", "R")].double()
    u, s, vt = torch.linalg.svd(gradient, full_matrices=False)
    wanted = -step * (u[:, :3] * s[:3]) @ vt[:3]
    held = scale * start[Name("x", "B")].double() @ r0 @ start[Name("x", "A")].double()
    assert torch.allclose(held, wanted, atol=1e-4 * step * float(s[0]))


def test_zero_core_starts_at_the_pretrained_weights() -> None:
    assert set(CORES) == {"zero", "spectral"}
    values = State({Name("x", "S"): torch.ones(3)})
    assert torch.equal(core(values, "zero", step=1.0, scale=1.0)[Name("x", "R")], torch.zeros(3, 3))


def test_sign_start_is_the_svd_of_the_sign() -> None:
    gradient = gaussian(10, 17)
    start = sign_start(State({Name("x", "G"): gradient.float()}), 4, 0)
    b, a, values = (start[Name("x", role)].double() for role in ("B", "A", "S"))
    u, s, vt = torch.linalg.svd(gradient.sign(), full_matrices=False)
    assert torch.allclose((b * values) @ a, (u[:, :4] * s[:4]) @ vt[:4], atol=1e-4)
    assert not torch.allclose(projector(b), projector(torch.linalg.svd(gradient)[0][:, :4]), atol=0.1)
