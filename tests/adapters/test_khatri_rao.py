"""ABBA's geometry: products by Khatri-Rao factors, its start, its gradients, and what it is not."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fedsb.adapters import SPECS, attach, layers
from fedsb.adapters.khatri_rao import Hadamard, pair_ranks
from fedsb.adapters.layer import LowRankLayer
from fedsb.adapters.linear import out_in
from fedsb.adapters.residual import Residual
from fedsb.core.errors import UserError
from fedsb.core.rng import torch_generator
from fedsb.core.state import Name

PAIRS = ("B1", "A1", "B2", "A2")
sizes = st.integers(2, 12)


def drawn(m: int, n: int, r1: int, r2: int, seed: int = 0) -> dict[str, Tensor]:
    shapes = {"B1": (m, r1), "A1": (r1, n), "B2": (m, r2), "A2": (r2, n)}
    return {role: torch.randn(shape, generator=torch_generator(seed, "test", role), dtype=torch.float64) for role, shape in shapes.items()}


def dense(f: dict[str, Tensor]) -> Tensor:
    return (f["B1"] @ f["A1"]) * (f["B2"] @ f["A2"])


@settings(max_examples=40, deadline=None)
@given(m=sizes, n=sizes, r1=st.integers(1, 4), r2=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_split_is_the_product_entry_by_entry(m: int, n: int, r1: int, r2: int, seed: int) -> None:
    f = drawn(m, n, r1, r2, seed)
    left, right = SPECS["abba"].split(tuple(f[role] for role in PAIRS))
    assert (left.shape, right.shape) == ((m, r1 * r2), (r1 * r2, n))
    torch.testing.assert_close(left @ right, dense(f))


@settings(max_examples=40, deadline=None)
@given(m=sizes, n=sizes, r1=st.integers(1, 4), r2=st.integers(1, 4), seed=st.integers(0, 99))
def test_both_ways_forward_are_that_product_and_its_closed_gradients(m: int, n: int, r1: int, r2: int, seed: int) -> None:
    """∂B1 = (G∘M2) A1ᵀ, ∂A1 = B1ᵀ (G∘M2), and so on with M_j = B_j A_j and G the gradient of the whole matrix."""
    f = drawn(m, n, r1, r2, seed)
    layer = Hadamard({role: tuple(t.shape) for role, t in f.items()}).double()
    layer.load_state_dict(f)
    x, g = (torch.randn(2, 3, width, generator=torch_generator(seed, "x", str(width)), dtype=torch.float64) for width in (n, m))
    y = layer(x)
    torch.testing.assert_close(y, F.linear(x, dense(f)))
    (y * g).sum().backward()
    whole = torch.einsum("bti,btj->ij", g, x)
    m1, m2 = f["B1"] @ f["A1"], f["B2"] @ f["A2"]
    wanted = {
        "B1": (whole * m2) @ f["A1"].T,
        "A1": f["B1"].T @ (whole * m2),
        "B2": (whole * m1) @ f["A2"].T,
        "A2": f["B2"].T @ (whole * m1),
    }
    for role, gradient in wanted.items():
        torch.testing.assert_close(layer.get_parameter(role).grad, gradient)


def test_it_reaches_the_product_of_the_ranks_and_is_not_the_product_of_two_outputs() -> None:
    f = drawn(12, 12, 3, 3)
    assert torch.linalg.matrix_rank(dense(f)) == 9
    x = torch.randn(12, dtype=torch.float64, generator=torch_generator(0, "x"))
    assert not torch.allclose(dense(f) @ x, (f["B1"] @ (f["A1"] @ x)) * (f["B2"] @ (f["A2"] @ x)))


def started(family: str = "abba", rank: int = 4, m: int = 20, n: int = 30) -> tuple[nn.Module, Tensor]:
    weight = torch.randn(m, n, generator=torch_generator(1, "test"))
    model = nn.Sequential(nn.Linear(n, m, bias=False))
    model[0].weight = nn.Parameter(weight)
    spec = SPECS[family]
    layer = attach(model, spec, targets=["0"], rank=rank, scale=2.0)["0"]
    start = spec.starts["weight_svd"]
    assert start is not None
    state = start({"0": weight}, rank, 7)
    with torch.no_grad():
        for role in spec.factors:
            if role in spec.frozen:
                layer.hold(role, state[Name("0", role)])
            else:
                layer.weight_of(role).copy_(state[Name("0", role)])
    return model, weight


def test_the_start_is_the_weights_leading_pair_beside_a_zero_and_w0_stays() -> None:
    model, weight = started()
    layer = layers(model)["0"]
    u, s, vt = torch.linalg.svd(weight.double())
    assert torch.allclose((layer.weight_of("B1") @ layer.weight_of("A1")).double(), u[:, :2] * s[:2] @ vt[:2], atol=1e-4)
    assert torch.allclose(layer.weight_of("B1").norm(dim=0), layer.weight_of("A1").norm(dim=1), rtol=1e-4)  # √S on both sides
    bound = sqrt(6 / weight.shape[1])
    largest = float(layer.weight_of("A2").detach().abs().max())
    assert 0.8 * bound < largest <= bound
    assert not layer.delta().any()
    assert torch.equal(layer.pristine, weight)


def test_at_the_start_b2_alone_has_a_gradient_and_none_would_with_both_pairs_at_loras() -> None:
    model, _ = started()
    layer = layers(model)["0"]
    model(torch.ones(3, 30)).square().sum().backward()
    moved = [role for role in PAIRS if layer.weight_of(role).grad is not None and layer.weight_of(role).grad.abs().max() > 1e-6]
    assert moved == ["B2"]
    layer.product.zero_grad()
    with torch.no_grad():
        layer.weight_of("B1").zero_()
    model(torch.ones(3, 30)).square().sum().backward()
    assert not any(layer.weight_of(role).grad.any() for role in PAIRS)


def test_columns_of_a_cores_frame_have_the_length_one_on_average() -> None:
    model, _ = started("abba_core", rank=6, m=300, n=400)
    left, right = layers(model)["0"].split()
    del left  # R is zero
    assert float(right.square().sum(dim=1).mean()) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize(("rank", "first", "pair"), [(2, None, (1, 1)), (7, None, (3, 4)), (7, 5, (5, 2))])
def test_the_rank_is_that_of_both_pairs(rank: int, first: int | None, pair: tuple[int, int]) -> None:
    assert pair_ranks(rank, first) == pair


@pytest.mark.parametrize(("rank", "first"), [(1, None), (4, 4), (4, 0)])
def test_a_pair_without_a_rank_is_refused(rank: int, first: int | None) -> None:
    with pytest.raises(UserError, match=rf"^rank={rank} with .*: each of the two pairs needs a rank of at least 1; "):
        pair_ranks(rank, first)


@pytest.mark.parametrize("family", ["abba", "abba_masked", "abba_alternating", "abba_core"])
def test_a_product_of_more_than_full_rank_is_refused(family: str) -> None:
    attach(nn.Sequential(nn.Linear(30, 20)), SPECS[family], targets=["0"], rank=8, scale=1.0)
    with pytest.raises(UserError, match=r"^rank \(10\), which needs 25 here, exceeds min\(out, in\) = 20 of '0'; "):
        attach(nn.Sequential(nn.Linear(30, 20)), SPECS[family], targets=["0"], rank=10, scale=1.0)


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("abba", {"first": "two"}, r"^adapter\.options\.first=two is no rank; give a whole number, or null for half of the rank$"),
        ("abba", {"first": 4.5}, r"^adapter\.options\.first=4\.5 is no rank; "),
        ("abba_core", {"diagonal": "no"}, r"^adapter\.options\.diagonal=no must be true or false$"),
    ],
)
def test_options_of_another_kind_are_refused(family: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        SPECS[family].having(options).shapes(20, 30, 8)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize(("added", "hold"), [(False, "auto"), (True, "auto"), (True, "merge")], ids=["at W0", "beside W0", "merged"])
def test_a_layer_of_one_matrix_is_the_layer_of_two(kind: str, added: bool, hold: str) -> None:
    """With a pass less where nobody looks than where a hook does: the same output, the same gradients of all factors and of the input."""
    m, n = 9, 7
    base = nn.Linear(n, m) if kind == "linear" else Conv1D(m, n)
    layer = LowRankLayer(base, SPECS["abba"], 6, 1.5, hold=hold)
    draw = torch_generator(0, "one pass")
    for parameter in layer.product.parameters():
        parameter.data.normal_(generator=draw)
    if added:
        layer.set_residual(torch.randn(m, n, generator=draw))
    x = torch.randn(3, 4, n, generator=draw, requires_grad=True)
    seen: list[torch.Tensor] = []

    def out_and_gradients() -> list[torch.Tensor]:
        out = layer(x)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *layer.product.parameters()])]

    assert layer._whole() is not None
    once = out_and_gradients()
    handle = layer.product.register_forward_hook(lambda module, inputs, output: seen.append(output))
    twice = out_and_gradients()
    assert len(seen) == 1
    handle.remove()
    for one, two in zip(once, twice, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer._whole() is None
    layer.active = False
    torch.testing.assert_close(layer(x), layer.frozen(x))


def test_what_has_to_be_seen_apart_is_not_made_one_matrix() -> None:
    for layer in (
        LowRankLayer(nn.Linear(7, 9), SPECS["abba"], 6, 1.5, dropout=0.1),
        LowRankLayer(nn.Linear(7, 9).to(torch.bfloat16), SPECS["abba"], 6, 1.5),
        LowRankLayer(nn.Linear(7, 9), SPECS["abba"], 2, 1.5),  # factors are less
        LowRankLayer(nn.Linear(7, 9), SPECS["lora"], 2, 1.5),
    ):
        assert layer._whole() is None


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("form", ["factors", "matrix"])
@pytest.mark.parametrize("family", ["abba", "abba_masked"])
def test_what_stands_beside_a_weight_is_not_rounded_by_it(kind: str, form: str, family: str) -> None:
    """Seen by inputs that W0 maps to exact zeros, where its own products hide nothing: its columns come in equal pairs."""
    m, n, rank, draw = 9, 14, 6, torch_generator(0, "beside")
    base = nn.Linear(n, m, bias=False) if kind == "linear" else Conv1D(m, n)
    layer = LowRankLayer(base, SPECS[family], rank, 1.5)
    columns = torch.randn(m, n // 2, generator=draw)
    base.weight.data = out_in(base, columns.repeat_interleave(2, dim=1)).contiguous()
    for role in SPECS[family].factors:
        layer.weight_of(role).data = 0.01 * torch.randn(layer.weight_of(role).shape, generator=draw)
    u, v = 1e-4 * torch.randn(m, 2, generator=draw), torch.randn(2, n, generator=draw)
    residual = Residual.of(u @ v)
    if form == "factors":
        residual = Residual(m, n)
        residual.add(1, u, v)
    layer.set_residual(residual)
    apart = torch.eye(n)[0::2] - torch.eye(n)[1::2]
    b1, a1, b2, a2 = (layer.weight_of(role).detach().double() for role in ("B1", "A1", "B2", "A2"))
    wanted = apart.double() @ (u.double() @ v.double() + 1.5 * (b1 @ a1) * (b2 @ a2)).T
    found = layer(apart).detach().double()
    assert layer.product.joins
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
