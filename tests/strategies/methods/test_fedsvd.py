"""FedSVD hands out the mean product with an orthonormal A, whoever made the mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsb.core.state import Name, State
from tests.strategies.federations import classification, federate
from tests.strategies.private_runs import CLIENT

ROUNDS = ["method=fedsvd", "federation.num_rounds=3", "train.lr=0.02", "adapter.alpha=5"]


@pytest.mark.parametrize("privacy", [[], CLIENT], ids=["plain", "noised mean"])
def test_a_round_turns_the_mean_product_and_does_not_move_it(
    privacy: list[str], tiny_bert: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``P S Qᵀ`` of the mean B and the A that was sent, against the dense product; round 1 starts from an A that is not orthonormal."""
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path))
    run = federate([*classification(tiny_bert, tiny_csv), *ROUNDS, *privacy])
    for before, after, exchanges in zip(run.kept.states[:-1], run.kept.states[1:], run.grid.rounds().values(), strict=True):
        uploads = [(e.answer.state(run.prepared.adapted.layouts.up[0]), e.answer.num_examples) for e in exchanges]
        for b, columns in after.pick("B").items():
            a = Name(b.module, "A")
            torch.testing.assert_close(after[a] @ after[a].T, torch.eye(3), rtol=0.0, atol=1e-5)
            square = columns.T @ columns
            assert (square - square.diag().diag()).abs().max() < 1e-4 * square.abs().max()
            if not privacy:
                wanted = mean_of(uploads, b) @ before[a].double()
                torch.testing.assert_close(columns.double() @ after[a].double(), wanted, rtol=1e-4, atol=1e-7)
    first = run.kept.states[0]
    assert all((first[a] @ first[a].T - torch.eye(3)).abs().max() > 0.1 for a in first.pick("A"))


def mean_of(uploads: list[tuple[State, int]], name: Name) -> torch.Tensor:
    total = sum(count for _, count in uploads)
    return torch.stack([count / total * state[name].double() for state, count in uploads]).sum(dim=0)
