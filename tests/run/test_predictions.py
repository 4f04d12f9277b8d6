"""What a run keeps of each test item: the metrics are its means, and it is of the items and of nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedsb.core.errors import UserError
from fedsb.data import Examples
from fedsb.run.predictions import FILE, Predictions, read_predictions, write_predictions
from tests.run.mortal import Run


@pytest.fixture
def numbers(tmp_path: Path) -> list[str]:
    paths = {name: tmp_path / f"{name}.csv" for name in ("numbers", "numbers-test")}
    for path in paths.values():
        path.write_text("text,label\n" + "".join(f"goal {'bank ' * (i % 4)},{i % 4}\n" for i in range(40)), encoding="utf-8")
    return [f"data.path='{paths['numbers']}'", f"data.test_path='{paths['numbers-test']}'", "data.task=regression"]


def test_the_metrics_of_the_last_round_are_means_of_what_is_kept(run: Run, tmp_path: Path) -> None:
    summary = run(tmp_path / "run", "method=fedavg_lora")
    kept = read_predictions(tmp_path / "run")
    assert kept is not None
    assert kept.round == 3
    for name in ("accuracy", "loss"):
        assert kept.measured(name)[0].mean() == pytest.approx(summary["metrics"][name], abs=1e-6)
    assert np.array_equal(kept.columns["guess"] == kept.columns["truth"], kept.columns["accuracy"] == 1)
    assert kept.columns["truth"].tolist() == [i % 3 for i in range(12)]


def test_errors_of_numbers_are_kept(run: Run, numbers: list[str], tmp_path: Path) -> None:
    summary = run(tmp_path / "run", "method=fedavg_lora", *numbers)
    kept = read_predictions(tmp_path / "run")
    assert kept is not None
    assert kept.measured("mse")[0].mean() == pytest.approx(summary["metrics"]["mse"], rel=1e-5)
    with pytest.raises(KeyError):
        kept.measured("pearson")


def test_the_base_is_measured_item_by_item_and_what_clients_measure_is_not_kept(run: Run, tmp_path: Path) -> None:
    run(tmp_path / "base", "method=untouched")
    run(tmp_path / "own", "method=fedsa_lora", "federation.num_rounds=1")
    base = read_predictions(tmp_path / "base")
    assert base is not None
    assert base.round == 0
    assert read_predictions(tmp_path / "own") is None


def test_items_are_told_apart_by_texts_targets_and_order() -> None:
    some = Examples(("a", "b"), targets=(0, 1))
    others = [Examples(("b", "a"), targets=(1, 0)), Examples(("a", "c"), targets=(0, 1)), Examples(("a", "b"), targets=(0, 0))]
    others += [Examples(("a", "b")), Examples(("a", "b"), ("a", "b"), (0, 1))]
    assert len({each.sha256() for each in (some, *others)}) == 6
    assert some.sha256() == Examples(("a", "b"), targets=(0, 1), owners=("x", "y")).sha256()


def test_what_is_written_is_read_and_a_torn_file_is_one_line(tmp_path: Path) -> None:
    columns = {"loss": np.array([0.5, 1.5], np.float32), "loss_weight": np.array([1, 3], np.int32), "accuracy": np.array([1, 0], np.uint8)}
    path = write_predictions(tmp_path, Predictions(4, "ab" * 32, columns))
    first = path.read_bytes()
    kept = read_predictions(tmp_path)
    assert kept is not None
    assert (kept.round, kept.items) == (4, "ab" * 32)
    values, weights = kept.measured("loss")
    assert (values @ weights) / weights.sum() == 1.25
    assert kept.measured("accuracy")[1].tolist() == [1.0, 1.0]
    assert write_predictions(tmp_path, kept).read_bytes() == first
    (tmp_path / FILE).write_bytes(first[:40])
    with pytest.raises(UserError, match=r"predictions.safetensors' can't be read .*; run it again, or remove the file"):
        read_predictions(tmp_path)
    assert read_predictions(tmp_path / "nowhere") is None
