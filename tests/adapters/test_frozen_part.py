"""The frozen part of a layer: whatever the rule, it computes with W0 and all that was added; W0 is always there to go back to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import fedsb.adapters.rounding
from fedsb.adapters.frozen_part import FrozenPart
from fedsb.adapters.residual import Residual
from fedsb.adapters.rounding import rounded
from fedsb.core.errors import UserError
from fedsb.core.rng import torch_generator
from fedsb.core.state import Name, State
from fedsb.wire.frozen import FrozenBundle, FrozenLog, FrozenView

M, N = 24, 40  # factors outweigh the matrix from rank 16 on
BASES: dict[str, Callable[[], nn.Module]] = {"linear": lambda: nn.Linear(N, M), "conv1d": lambda: Conv1D(M, N)}
HOLDS = ["factors", "dense", "merge"]


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(seed, "test"))


def part_of(kind: str, hold: str, dtype: torch.dtype = torch.float32) -> FrozenPart:
    base = BASES[kind]()
    base.weight.data = gaussian(*base.weight.shape, seed=5)  # type: ignore[arg-type]
    base.bias.data.fill_(0.5)  # type: ignore[operator, union-attr]
    return FrozenPart(base.to(dtype), hold)


def pairs_of(ranks: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Return small pairs, as residuals are."""
    return [(0.01 * gaussian(M, r, seed=10 + i), gaussian(r, N, seed=50 + i)) for i, r in enumerate(ranks)]


def grown(pairs: list[tuple[Tensor, Tensor]]) -> Residual:
    residual = Residual(M, N)
    for version, pair in enumerate(pairs):
        residual.add(version, *pair)
    return residual


def oracle(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return sum((u.double() @ v.double() for u, v in pairs), start=torch.zeros(M, N, dtype=torch.float64))


def weight_in(part: FrozenPart) -> Tensor:
    """Return the weight (m, n) that a part computes with, from what it computes."""
    dtype = part.weight.dtype
    nothing = part(torch.zeros(1, N, dtype=dtype))
    return (part(torch.eye(N, dtype=dtype)) - nothing).T.detach().double()


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("ranks", [[3], [4, 4, 4], [8, 8, 8]], ids=["one", "light", "heavy"])
def test_in_float32_all_rules_are_the_sum_to_1e_5(kind: str, hold: str, ranks: list[int]) -> None:
    part, pairs = part_of(kind, hold), pairs_of(ranks)
    pristine, bits = part.pristine.clone(), weight_in(part)
    part.set(grown(pairs))
    wanted = pristine.double() + oracle(pairs)
    torch.testing.assert_close(weight_in(part), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert part.residual is not None
    torch.testing.assert_close(part.residual, oracle(pairs), rtol=0, atol=1e-6)
    part.set(None)
    assert torch.equal(part.pristine, pristine)
    assert torch.equal(weight_in(part), bits)
    assert part.residual is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [[4, 4], [8, 8, 8]], ids=["light", "heavy"])
def test_a_narrow_base_keeps_its_bits_and_a_merge_loses_most(dtype: torch.dtype, ranks: list[int]) -> None:
    """Residuals are small beside weights: here a thousandth, as real ones are."""
    pairs, lost = [(0.01 * u, v) for u, v in pairs_of(ranks)], {}
    for hold in (*HOLDS, "auto"):
        part = part_of("linear", hold, dtype)
        before = part.weight.detach().clone()
        part.set(grown(pairs))
        assert part.residual is None or hold == "merge" or torch.equal(part.weight, before)
        held = torch.zeros(M, N).double() if part.residual is None else part.residual
        lost[hold] = float((held - oracle(pairs)).norm() / oracle(pairs).norm())
    assert max(lost[hold] for hold in ("factors", "dense", "auto")) < 1e-5
    assert lost["merge"] > 0.1


@pytest.mark.parametrize("small", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("ranks", [[4], [8, 8, 8]], ids=["light", "heavy"])
def test_auto_is_exact_to_1e_5_in_float32_however_small_a_residual_is(small: float, ranks: list[int]) -> None:
    """A merge into float32 is not: it rounds by the weight's spacing, whatever is added."""
    pairs, lost = [(small * u, v) for u, v in pairs_of(ranks)], {}
    for hold in ("auto", "merge"):
        part = part_of("linear", hold)
        part.set(grown(pairs))
        assert part.residual is not None
        lost[hold] = float((part.residual - oracle(pairs)).norm() / oracle(pairs).norm())
    assert lost["auto"] < 1e-6
    assert (lost["merge"] > 1e-5) == (small < 1e-1)


def nearest(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the value of a dtype that is nearest to each of float64; where two are, the one whose last bit is 0."""
    guess = wide.to(dtype)
    steps = [guess.view(torch.int16) + step for step in (-1, 0, 1)]
    all_of = torch.stack([bits.view(dtype) for bits in steps])
    apart = (all_of.double() - wide).abs()
    odd = torch.stack(steps) & 1
    best = torch.where(apart == apart.amin(0), odd, 2).argmin(0, keepdim=True)
    return all_of.gather(0, best)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", BASES)
def test_a_merge_rounds_once_from_all_that_was_added(kind: str, dtype: torch.dtype) -> None:
    """Over rounds: neither the residual nor an earlier round's sum is rounded on the way."""
    part, pairs = part_of(kind, "merge", dtype), pairs_of([3] * 6)
    residual, pristine = Residual(M, N), part.pristine.clone()
    for version, pair in enumerate(pairs, start=1):
        residual.add(version, *pair)
        part.set(residual)
        held = part.weight if kind == "linear" else part.weight.T
        assert torch.equal(held, nearest(pristine.double() + residual.matrix().double(), dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", [-1, 0, 1], ids=["below", "tie", "above"])
def test_what_lies_beside_a_tie_goes_to_its_own_side(dtype: torch.dtype, side: int) -> None:
    """By less than float32 tells, for each value of the last bit and both signs."""
    unit = torch.finfo(dtype).eps
    values = torch.tensor([[sign * (1 + i * unit + unit / 2 + side * 2.0**-40) for i in range(8)] for sign in (1, -1)], dtype=torch.float64)
    assert torch.equal(rounded(values, dtype), nearest(values, dtype))


class Sizes(TorchDispatchMode):
    """Notes how many bytes the tensors have that operations return which lie in none that they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        if isinstance(found, Tensor) and found.untyped_storage().data_ptr() not in given:
            self.seen.add(found.nbytes)
        return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(600, 70), (70, 600), (42000,), (20, 30, 70), ()], ids=str)
def test_rounding_makes_one_tensor_of_the_whole_size(dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks that need not end where the tensor does; transposed, as a Conv1D's weight is, too."""
    monkeypatch.setattr(fedsb.adapters.rounding, "BLOCK", 4096)
    wide = torch.randn(shape, dtype=torch.float64, generator=torch_generator(3, "test"))
    for matrix in (wide, wide.T) if len(shape) == 2 else (wide,):
        with Sizes() as sizes:
            made = rounded(matrix, dtype)
        assert torch.equal(made, nearest(matrix, dtype))
        assert made.stride() == matrix.stride()
        assert max(sizes.seen - {made.nbytes}) <= 8 * 4096


def test_beside_a_narrow_base_autocast_rounds_nothing() -> None:
    part, pairs = part_of("linear", "auto", torch.bfloat16), pairs_of([4])
    part.set(grown(pairs))
    x = gaussian(7, N, seed=1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        added = part.added(x)
    assert added is not None
    wanted = x.double() @ oracle(pairs).T
    torch.testing.assert_close(added.double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("hold", HOLDS)
def test_a_rule_holds_no_matrix_that_it_does_not_need(hold: str) -> None:
    part, residual = part_of("linear", hold), grown(pairs_of([4]))
    where = part.weight.data_ptr()
    part.set(residual)
    assert (part.weight.data_ptr() == where) == (hold != "merge")
    assert residual.dense is None
    shapes = {"factors": [(M, 4), (4, N)], "dense": [(M, N)], "merge": []}[hold]
    assert [tuple(t.shape) for t in part._beside] == shapes
    if hold == "factors":
        assert [t.data_ptr() for t in part._beside] == [t.data_ptr() for pair in residual.pairs for t in pair]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.data())
def test_when_it_is_asked_for_changes_no_bit(ranks: list[int], data: st.DataObject) -> None:
    pairs = pairs_of(ranks)
    for ask in (Residual.matrix, Residual.settle):
        eager, lazy = Residual(M, N), grown(pairs)
        for version, pair in enumerate(pairs):
            eager.add(version, *pair)
            if data.draw(st.booleans(), label="asked"):
                ask(eager)
        ask(lazy), ask(eager)
        assert torch.equal(eager.matrix(), lazy.matrix())
        for mine, theirs in zip(eager.pairs, lazy.pairs, strict=True):
            assert all(map(torch.equal, mine, theirs))


def low_rank_pairs(count: int) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of rank 4 whose sum never has more than rank 5."""
    left, right = gaussian(M, 5, seed=1), gaussian(5, N, seed=2)
    return [(left @ gaussian(5, 4, seed=3 + i), gaussian(4, 5, seed=30 + i) @ right) for i in range(count)]


def test_what_becomes_too_heavy_is_recompressed_without_loss() -> None:
    pairs = low_rank_pairs(12)
    residual = grown(pairs)
    residual.settle()
    assert residual.dense is None
    assert sum(u.shape[1] for u, _ in residual.pairs) <= 15
    assert any(u.shape[1] == 5 for u, _ in residual.pairs)
    total = sum(u.double() @ v.double() for u, v in residual.pairs)
    torch.testing.assert_close(total, oracle(pairs), rtol=0, atol=1e-5 * float(oracle(pairs).abs().max()))


@pytest.mark.parametrize("low", [True, False], ids=["recompressed", "matrix"])
def test_who_comes_late_holds_the_bits_of_the_others(low: bool) -> None:
    """Those that were there fold as versions come; a late one is sent the form in which they hold it."""
    pairs = low_rank_pairs(9) if low else pairs_of([4] * 9)
    log, there = FrozenLog(), FrozenView()
    log.as_factors = {"a"}
    for u, v in pairs:
        log.append(State({Name("a", "U"): u, Name("a", "V"): v}))
        there.apply(bundle_of(log, log.version - 1))
        there.residuals["a"].settle()
    late, bundle = FrozenView(), bundle_of(log, 0)
    assert {name.role[0] for name in bundle.state} == ({"P", "Q"} if low else {"D"})
    late.apply(bundle)
    parts = []
    for view in (there, late, log.view()):
        part = part_of("linear", "factors")
        part.set(view.residuals["a"])
        parts.append(part(gaussian(3, N, seed=9)))
    assert torch.equal(parts[0], parts[1])
    assert torch.equal(parts[0], parts[2])


def bundle_of(log: FrozenLog, since: int) -> FrozenBundle:
    bundle = log.bundle(since)
    assert bundle is not None
    return bundle


def test_a_delta_that_lies_elsewhere_is_the_same() -> None:
    pairs, logs = pairs_of([3, 3]), [FrozenLog(), FrozenLog()]
    for log in logs:
        for u, v in pairs:
            log.append(State({Name("a", "U"): u, Name("a", "V"): v}))
    logs[1].rest(1, logs[1].deltas()[1].map(Tensor.clone))
    assert torch.equal(*(log.view().residuals["a"].matrix() for log in logs))
    assert all(map(torch.equal, *(bundle_of(log, 0).state.values() for log in logs)))


def test_a_delta_that_lies_elsewhere_takes_no_recompressed_sums_place() -> None:
    residual, pairs = Residual(M, N), low_rank_pairs(4)
    for version, pair in enumerate(pairs, start=1):
        residual.add(version, *pair)
    residual.settle()
    assert [u.shape[1] for u, _ in residual.pairs] == [5]
    residual.move(4, *pairs[3])
    wanted = oracle(pairs)
    torch.testing.assert_close(residual.matrix().double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


class Int8(nn.Module):
    """A base whose weight is no matrix of floats."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(M, N, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (0.5 * self.weight.to(x)).T


def test_a_quantised_base_is_never_merged_into() -> None:
    with pytest.raises(UserError, match=r"frozen\.hold=merge needs a base whose weights are floats"):
        FrozenPart(Int8(), "merge")
    pairs, part = pairs_of([4]), FrozenPart(Int8())
    part.set(grown(pairs))
    torch.testing.assert_close(part(torch.eye(N)).T.double(), 0.5 + oracle(pairs), rtol=0, atol=1e-5)
    assert torch.equal(part.weight, torch.ones(M, N, dtype=torch.int8))
