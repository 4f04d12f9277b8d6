"""Runs side by side: labels name what varies and nothing that follows from it; means over seeds with their error; a CSV to go on with."""

from __future__ import annotations

import csv
import math
import statistics
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsb.core.errors import UserError
from fedsb.report.comparison import write_comparison
from fedsb.report.folders import runs_in, write_reports
from fedsb.report.labels import run_labels
from fedsb.report.methods import mean_text
from fedsb.report.plots import _style
from fedsb.report.report import report_text
from fedsb.run.folder import Run, read_run
from fedsb.run.records import RoundRecord
from tests.report.made import SCORES, Maker, make_records
from tests.report.test_report import table_after

AXES = {
    "rank": (4, 8),
    "seed": (0, 1),
    "privacy.epsilon": (1.0, 8.0),
    "train.lr": (0.1, 0.2),
    "init.kind": ("gradient", "weight_svd"),
    "federation.partition.alpha": (0.1, 1.0),
}
WORDS = {"privacy.epsilon": "epsilon", "train.lr": "lr", "init.kind": "init", "federation.partition.alpha": "alpha"}


def nested(flat):
    tree: dict = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


@given(st.sets(st.sampled_from(sorted(AXES)), min_size=1, max_size=4))
def test_a_label_names_every_axis_of_a_grid_and_nothing_that_follows_from_it(axes):
    points = [dict(zip(sorted(axes), values, strict=True)) for values in product(*(AXES[axis] for axis in sorted(axes)))]
    runs = []
    for i, point in enumerate(points):
        # What the composition derives: of the rank and the rate, and the same everywhere.
        derived = {"adapter.rank": point.get("rank", 4), "adapter.alpha": 2 * point.get("rank", 4), "wire": "float32"}
        config = nested({"method.name": "fed_sb", "method.lr": point.get("train.lr", 1), "output": f"o{i}", **derived, **point})
        runs.append(Run(Path(f"o{i}"), config, tuple(make_records()), None))
    for label, point in zip(run_labels(runs), points, strict=True):
        words = dict(zip(label.split()[1::2], label.split()[2::2], strict=True))
        assert words == {WORDS.get(axis, axis): str(value) for axis, value in point.items()}


def sweep(make_run: Maker) -> list[Path]:
    shifts = {(rank, seed): 0.01 * rank + 0.02 * seed for rank in (4, 8) for seed in (0, 1, 2)}
    return [make_run(f"sweep/{i}", rank=rank, seed=seed, shift=shift) for i, ((rank, seed), shift) in enumerate(shifts.items())]


def test_a_sweep_is_reported_whole_from_its_folder(make_run: Maker, tmp_path: Path) -> None:
    few = [RoundRecord(0)]
    folders = [make_run(f"sweep/{name}", rank=rank, records=few) for name, rank in (("10", 4), ("9", 8))]
    found = write_reports([tmp_path / "sweep"])
    assert [path.parent.name for path in found[:-2]] == ["9", "10"]
    assert found[-2:] == [tmp_path / "sweep" / "comparison.md", tmp_path / "sweep" / "comparison.html"]
    assert runs_in(folders[0]) == [folders[0]]
    with pytest.raises(UserError, match="holds no run"):
        write_reports([tmp_path])


def test_means_over_seeds_stand_with_their_standard_error(make_run: Maker, tmp_path: Path) -> None:
    head, *rows = table_after("Over seeds", write_comparison(sweep(make_run)).read_text())
    for row, rank in zip(rows, (4, 8), strict=True):
        scores = [SCORES[3] - 0.01 * rank - 0.02 * seed for seed in (0, 1, 2)]
        error = statistics.stdev(scores) / math.sqrt(3)
        assert (row[0], row[1]) == (f"fed_sb rank {rank}", "3")
        assert row[head.index("accuracy")] == f"{statistics.mean(scores):.3f} ± {error:.3f}"


def test_a_seed_that_ran_twice_counts_once(make_run: Maker, tmp_path: Path) -> None:
    once = sweep(make_run)
    wanted = table_after("Over seeds", write_comparison(once).read_text())
    again = write_comparison([*once, make_run("again", rank=4, seed=0)]).read_text()
    assert [row[1] for row in table_after("Over seeds", again)] == [row[1] for row in wanted]
    assert "Over seeds" not in write_comparison([make_run("x", rank=4), make_run("y", rank=4)]).read_text()


def test_one_seed_has_no_mean_and_one_value_no_error(make_run: Maker, tmp_path: Path) -> None:
    text = write_comparison([make_run("a", rank=4), make_run("b", rank=8)]).read_text()
    assert "Over seeds" not in text
    assert (mean_text([0.5]), mean_text([]), mean_text([0.5, math.nan])) == ("0.500", "–", "–")


def test_no_two_runs_of_many_methods_look_alike() -> None:
    runs = [Run(Path(f"{i}-{seed}"), {"method": {"name": f"m{i}"}}, (), None) for i in range(15) for seed in range(2)]
    styles = [tuple(_style(runs, index).values()) for index in range(len(runs))]
    assert len(set(styles)) == len(runs)


def test_metrics_of_clients_own_parts_are_told_apart(make_run: Maker) -> None:
    own = [replace(record, measured_by="clients") for record in make_records()]
    server, clients = make_run("a", method="fed_sb"), make_run("b", method="fedsa_lora", records=own)
    comparison = write_comparison([server, clients])
    assert "Not to be held against the others: fedsa_lora is measured by its clients" in comparison.read_text()
    with comparison.with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        assert [row["measured_on"] for row in csv.DictReader(file)] == ["the test part", "the clients' own parts"]
    assert "Not to be held" not in write_comparison([clients, clients]).read_text()
    assert "weighted by its examples" in report_text(read_run(clients))
    assert "weighted by its examples" not in report_text(read_run(server))


def test_the_csv_has_the_figures_themselves(make_run: Maker, tmp_path: Path) -> None:
    folders = sweep(make_run)
    write_comparison(folders)
    with (tmp_path / "sweep" / "comparison.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, folder in zip(rows, folders, strict=True):
        run = read_run(folder)
        assert (row["rank"], row["seed"], row["folder"]) == (str(run.setting("rank")), str(run.setting("seed")), str(folder))
        assert float(row["accuracy"]) == run.summary["metrics"]["accuracy"]
        assert int(row["payload_total"]) == run.summary["payload_total"]


def test_a_run_that_did_not_finish_counts_in_no_mean(make_run: Maker, tmp_path: Path) -> None:
    cut = make_run("sweep/7", rank=4, seed=9, finished=False, records=[replace(r, metrics={"accuracy": 0.0}) for r in make_records()])
    text = write_comparison([*sweep(make_run), cut]).read_text()
    assert table_after("Over seeds", text)[1][1] == "3"
    assert "(did not finish)" in text
