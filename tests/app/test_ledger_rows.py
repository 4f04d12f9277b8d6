"""Which rows of a node's data its ledger knows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fedsb.app.assembly import num_examples
from fedsb.app.ledger_rows import rows_of
from fedsb.config.compose import load


def test_a_row_of_which_nothing_is_learnt_is_known_too(tiny_llama: Path, tmp_path: Path) -> None:
    """How many are left tells of it, so that a copy of it alone is the same data; and it stays known where longer texts are read."""
    rows = [{"text": "goal " * words, "label": "team"} for words in (2, 30, 31)]
    files = {name: tmp_path / f"{name}.jsonl" for name in ("whole", "left_out")}
    for path, part in zip(files.values(), (rows, rows[1:]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
    ways = ("data.task=causal_lm", "data.prompt=text", "data.response=label")
    base = ["model=pretrained", f"model.name='{tiny_llama}'", "data=files", *ways]
    short, long = (load([*base, f"train.max_length={most}"]) for most in (12, 48))
    whole, left_out = (str(path) for path in files.values())
    assert num_examples(short, "a", whole, ()) == 1
    known = rows_of(short, "a", whole, (), b"salt")
    assert len(known) == 3
    assert np.isin(rows_of(long, "a", left_out, (), b"salt"), known).all()
    assert num_examples(long, "a", whole, ()) == 3
    assert np.array_equal(rows_of(long, "a", whole, (), b"salt"), known)
