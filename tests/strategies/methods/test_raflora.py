"""raFLoRA: each component of the mean is that of who holds it, as a dense float64 sum says; at one rank for all it is FlexLoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsb.adapters import SPECS
from fedsb.core.state import State
from strategies.decomposing import SPLITS, Cut, Decomposing
from strategies.methods.raflora import Banded
from strategies.reducers import Aggregate
from tests.strategies.federations import classification, federate
from tests.strategies.uploads import HEADS, A, B, Case, cases, gaussian, law, reduce, wanted


def seen(whole: State, rank: int) -> State:
    """Return what a client of a rank sees of both factors."""
    return State({B: whole[B][:, :rank], A: whole[A][:rank], HEADS: whole[HEADS]})


@st.composite
def banded(draw: st.DrawFn) -> tuple[Case, State]:
    """Return uploads of several ranks, perhaps none of them the server's, and what the server had sent."""
    case = draw(cases())
    ranks = draw(st.lists(st.integers(1, case.rank), min_size=len(case.uploads), max_size=len(case.uploads)))
    m, n = len(case.uploads[0][B]), case.uploads[0][A].shape[1]
    sent = State({B: gaussian(m, case.rank, seed=7), A: gaussian(case.rank, n, seed=8), HEADS: gaussian(3, seed=9)})
    return Case(tuple(map(seen, case.uploads, ranks)), case.weights, case.scale, case.rank), sent


def oracle(case: Case, sent: State) -> Tensor:
    """Return the sum of the components' means, one component after the other, densely in float64."""
    found = torch.zeros(len(sent[B]), sent[A].shape[1], dtype=torch.float64)
    for j in range(case.rank):
        holders = [(u, w) for u, w in zip(case.uploads, case.weights, strict=True) if len(u[A]) > j] or [(sent, 1.0)]
        total = sum(w for _, w in holders)
        found += sum((w / total * torch.outer(u[B][:, j].double(), u[A][j].double()) for u, w in holders), start=torch.zeros(()))
    return found


def made(rule: type[Decomposing], case: Case, sent: State, split: str = "left") -> Aggregate:
    return reduce(rule(SPECS["lora"], (), Cut(None, split)), case.uploads, case.weights, sent)


@law
@given(banded(), st.sampled_from(sorted(SPLITS)))
def test_what_is_handed_out_is_the_best_of_its_rank_of_the_bands_means(drawn: tuple[Case, State], split: str) -> None:
    case, sent = drawn
    dense = oracle(case, sent)
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    best = (u[:, : case.rank] * s[: case.rank]) @ vh[: case.rank]
    found = made(Banded, case, sent, split)
    assert found.state[B].shape == sent[B].shape
    assert found.state[A].shape == sent[A].shape
    product = found.state[B].double() @ found.state[A].double()
    # of two components of nearly one size either is as good: what is missed tells, not which
    assert float((product - dense).norm() - (best - dense).norm()) <= 1e-5 * float(dense.norm())
    assert found.extras["truncation_error"] == pytest.approx(float((best - dense).norm() / dense.norm()), abs=1e-5)
    heads = sum(share * upload[HEADS].double() for share, upload in zip(case.shares, case.uploads, strict=True))
    torch.testing.assert_close(found.state[HEADS].double(), heads)


@law
@given(cases(), st.sampled_from(sorted(SPLITS)))
def test_at_the_servers_rank_for_all_it_is_flexlora_to_the_bit(case: Case, split: str) -> None:
    flex, here = (made(rule, case, case.uploads[0], split) for rule in (Decomposing, Banded))
    assert all(torch.equal(t, here.state[name]) for name, t in flex.state.items())
    assert flex.extras == here.extras
    dense = wanted(case) / case.scale
    assert float((oracle(case, case.uploads[0]) - dense).norm()) <= 1e-12 * max(1.0, float(dense.norm()))


def test_what_few_hold_keeps_its_energy_where_flexlora_loses_it_round_by_round() -> None:
    """One client of three has rank 2, and nobody moves: by FlexLoRA the second component falls to a third in every round."""
    u, _ = torch.linalg.qr(gaussian(9, 2, seed=1))
    v, _ = torch.linalg.qr(gaussian(7, 2, seed=2))
    start = State({B: u * torch.tensor([2.0, 1.0]), A: v.T, HEADS: torch.zeros(3)})
    for rule, share in ((Banded, 1.0), (Decomposing, 1 / 3)):
        state = start
        for number in range(1, 5):
            uploads = tuple(seen(state, rank) for rank in (1, 1, 2))
            state = made(rule, Case(uploads, (1.0, 1.0, 1.0), 1.0, 2), state).state
            assert torch.linalg.svdvals(state[B].double() @ state[A].double())[:2].tolist() == pytest.approx([2, share**number], rel=1e-5)


def test_a_run_of_several_ranks_hands_out_the_bands_means(
    tiny_bert: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held against the uploads as they came over the wire; and at one rank a run is FlexLoRA's, in its factors and all figures."""
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path))
    plain = [*classification(tiny_bert, tiny_csv), "federation.num_rounds=3", "federation.fraction=0.6", "train.lr=0.02"]
    run = federate([*plain, "method=raflora", "federation.ranks=[1,2,3]"])
    for number, exchanges in run.grid.rounds().items():
        adapted, sent = run.prepared.adapted, run.kept.states[number - 1]
        uploads = []
        for e in exchanges:
            layouts = adapted.layouts.at(1 + int(e.instruction.client.removeprefix("client-")) % 3)
            uploads.append((e.answer.state(layouts.up_in(number)), float(e.answer.num_examples)))
        for module in adapted.shapes:
            case = Case(tuple(local(u, module) for u, _ in uploads), tuple(w for _, w in uploads), adapted.scale, 3)
            dense, held = oracle(case, local(sent, module)), local(run.kept.states[number], module)
            s = torch.linalg.svdvals(dense)
            missed = float((held[B].double() @ held[A].double() - dense).norm())
            assert missed == pytest.approx(float(s[3:].norm()), abs=1e-5 * float(s.norm()))
    same = [federate([*plain, f"method={name}"]) for name in ("raflora", "flexlora")]
    assert same[0].sha256 == same[1].sha256
    assert [r.extras for r in same[0].records] == [r.extras for r in same[1].records]


def local(state: State, module: str) -> State:
    """Return a module's factors under the names of the drawn cases."""
    return State({B: state[B._replace(module=module)], A: state[A._replace(module=module)], HEADS: torch.zeros(3)})
