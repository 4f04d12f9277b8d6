"""Which rows of a node's data its ledger knows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedsb.app.client_data import num_examples
from fedsb.app.ledger_rows import readable_rows, rows_of
from fedsb.config.compose import load
from fedsb.core.errors import UserError


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


@pytest.mark.parametrize("labels", [("film", "trade"), ("film", "sport")])
def test_rows_are_known_where_a_run_is_refused_for_their_labels(labels: tuple[str, ...], tmp_path: Path) -> None:
    """Three refusals tell which label a row has; another path to the same rows is the same data all the same."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i}", "label": ("film", "sport")[i % 2]}) + "\n" for i in range(6)))
    base = ["data=files", "data.task=classification", "data.labels=[film,sport]"]
    wanted = rows_of(load([*base, "privacy=example", "privacy.noise_multiplier=2"]), "a", str(path), ("film", "sport"), b"salt")
    assert len(wanted) == 6
    assert np.array_equal(readable_rows(load(base), "a", str(path), labels, b"salt"), wanted)


def test_a_node_of_packaged_data_reads_nothing_beside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its working folder is no data of its own, whatever lies there."""
    (tmp_path / "another.jsonl").write_text(json.dumps({"text": "another's", "label": "film"}) + "\n")
    monkeypatch.chdir(tmp_path)
    config = load(["data=bbc_news", "data.test_path=/no/such.jsonl"])
    assert len(readable_rows(config, "client-0", None, ("film",), b"salt")) == 0


def test_rows_are_known_where_a_line_breaks_the_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i}", "label": "film"}) + "\n" for i in range(6)) + "{no json\n")
    config = load(["data=files", "data.task=classification", "data.labels=[film,sport]"])
    with pytest.raises(UserError):
        rows_of(config, "a", str(path), ("film", "sport"), b"salt")
    assert len(readable_rows(config, "a", str(path), ("film", "sport"), b"salt")) == 6
    assert len(readable_rows(config, "a", str(tmp_path / "none.jsonl"), ("film", "sport"), b"salt")) == 0
    (apart := tmp_path / "apart.jsonl").write_text("".join(json.dumps({"text": f"row {i}", "label": "hiv"}) + "\n" for i in range(4, 9)))
    with_apart = replace(config, data=replace(config.data, test_path=str(apart)))
    assert len(readable_rows(with_apart, "a", str(path), ("film", "sport"), b"salt")) == 9
    assert len(readable_rows(with_apart, "a", str(tmp_path / "none.jsonl"), ("film", "sport"), b"salt")) == 5
