"""FlexLoRA says what its decomposition and the clients' ranks take away from the mean of the products."""

from __future__ import annotations

import pytest
import torch

from fedsb.adapters import SPECS
from fedsb.core.rng import torch_generator
from fedsb.core.state import Name, State
from strategies.methods.flexlora import Decomposing


def test_what_is_cut_off_is_told_as_the_dense_mean_has_it() -> None:
    """Beyond the server's rank 3, and beyond the ranks 1 and 2 of two of its clients, against singular values of the (m, n) mean."""
    draw = torch_generator(0, "cut off")
    a, b = Name("m", "A"), Name("m", "B")
    uploads = [State({b: torch.randn(9, rank, generator=draw), a: torch.randn(rank, 7, generator=draw)}) for rank in (3, 2, 1)]
    rule = Decomposing(SPECS["lora"], (1, 2, 3))
    rule.begin(State({b: torch.zeros(9, 3), a: torch.zeros(3, 7)}))
    for upload, weight in zip(uploads, (3.0, 2.0, 1.0), strict=True):
        rule.add(upload, weight)
    mean = sum(w / 6 * u[b].double() @ u[a].double() for u, w in zip(uploads, (3, 2, 1), strict=True))
    energy = torch.linalg.svdvals(mean).square()
    beyond = [float(energy[rank:].sum() / energy.sum()) for rank in (1, 2, 3)]
    found = rule.finish().extras
    assert found == {
        "truncation_error": pytest.approx(beyond[2] ** 0.5, rel=1e-4),
        "cut_error": pytest.approx((sum(beyond) / 3) ** 0.5, rel=1e-4),
    }
    assert 0.05 < found["truncation_error"] < found["cut_error"]
