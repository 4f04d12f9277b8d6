"""Every method over a wire that rounds: what it moves, that it is as exact as the wire allows, and that no rounding counts twice."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest

from fedsb.core.state import HEAD
from fedsb.cost.table import cost_of
from strategies import STRATEGIES
from tests.strategies.federations import FEDERATED_METHODS, Federation, classification, federate, start_of
from tests.strategies.test_every_method import SCHEDULE

# A bfloat16 is rounded by itself, so that a mean and those that add to W0 stand for all; int8 goes with differences and what they leave.
COARSE = [("int8", method) for method in FEDERATED_METHODS]
COARSE += [("bfloat16", method) for method in FEDERATED_METHODS if method == "fedavg_lora" or STRATEGIES[method].adds_to_weights()]
UPLOADS = ("train", "train.projection")
SIZES = {"int8": lambda n: n + 4 * -(-n // 64), "bfloat16": lambda n: 2 * n}


@pytest.mark.parametrize(("dtype", "method"), COARSE)
def test_the_wire_may_be_coarse(dtype: str, method: str, tiny_bert: Path, tiny_csv: Path, tmp_path: Path) -> None:
    ranks = ["federation.ranks=[1,2,3]"] if STRATEGIES[method].any_rank else []
    more = ("train.local_steps=1", f"federation.wire_dtype={dtype}", f"output={tmp_path}", *ranks)
    run = federate([*classification(tiny_bert, tiny_csv), f"method={method}", start_of(method), *SCHEDULE, *more])
    assert all(not record.failed for record in run.records)
    cost = cost_of(run.config)
    assert run.payload() == (cost.payload_up, cost.payload_down, cost.payload_one_off)
    assert run.payload()[0] == sum(SIZES[dtype](values) for values in uploaded(run))
    if run.prepared.strategy.has_global_model and run.prepared.strategy.is_exact:
        assert max(record.exactness_gap for record in run.records[1:]) < 0.03
    if STRATEGIES[method].adds_to_weights():  # what was rounded off its factors went there, or nothing was
        assert not any(t.any() for name, t in run.prepared.strategy.sending.left.items() if name.role != HEAD)


def uploaded(run: Federation) -> list[int]:
    """Return the number of values of every tensor that came up."""
    trained = [(e.kind, e.instruction) for e in run.grid.exchanges if e.kind in UPLOADS]
    both = [(kind, told.round, run.prepared.strategy.layouts_of(told.client)) for kind, told in trained]
    came = [layouts.up_in(number) if kind == "train" else layouts.told for kind, number, layouts in both]
    return [prod(shape) for layout in came for _, shape in layout.shapes]
