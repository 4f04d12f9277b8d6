"""The page shows what the records hold: each figure is found again from ``metrics.jsonl`` alone, and nothing in it asks a network."""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedsb.report.folders import write_reports
from fedsb.report.page import page as page_module
from fedsb.report.page.view import A_ROUND, FEWEST, MOST_NUMBERS, points_a_line, ranges_text, thinned
from fedsb.run.folder import RunFolder
from tests.report.made import Maker, make_records
from tests.report.pages import METHODS, SEEDS, data_of, make_folder, make_sweep, page_of, retold, rows_of
from tests.report.test_report import table_after

LIBRARY = page_module.LIBRARY


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a sweep, reported."""
    folder = tmp_path_factory.mktemp("pages") / "sweep"
    make_sweep(folder)
    write_reports([folder])
    return folder


def lines_of(folder: Path, method: str) -> list[list[dict[str, Any]]]:
    """Return the records of a method's runs as they were written."""
    return [[json.loads(line) for line in (folder / f"{method}-{seed}" / "metrics.jsonl").read_text().splitlines()] for seed in SEEDS]


def test_means_and_errors_by_round_are_those_of_the_records(swept: Path) -> None:
    [part] = data_of(swept / "comparison.html")
    chart = next(each for each in part["charts"] if each["key"] == "quality")
    names = [variant["label"] for variant in chart["variants"]]
    assert names == ["accuracy", "macro_f1", "loss"]
    for place, name in enumerate(names):
        for method, row in rows_of(part, "quality", place).items():
            runs = lines_of(swept, method)
            assert row["x"] == [0, 1, 2, 3]
            for i, record in enumerate(zip(*runs, strict=True)):
                values = [each["metrics"][name] for each in record]
                assert row["y"][i] == pytest.approx(sum(values) / 2, rel=1e-5)
                assert row["e"][i] == pytest.approx(statistics.stdev(values) / math.sqrt(2), rel=1e-4, abs=1e-12)
    assert "From runs 1–6." in chart["caption"]
    assert {group["label"]: group["runs"] for group in part["groups"]} == {"fed_sb": [1, 2], "fedavg_lora": [3, 4], "fedex_lora": [5, 6]}


def test_bytes_stand_with_and_without_the_one_off(swept: Path) -> None:
    [part] = data_of(swept / "comparison.html")
    for place, keys in enumerate((("payload_up", "payload_down", "payload_one_off"), ("payload_up", "payload_down"))):
        rows = rows_of(part, "bytes", place)
        assert set(rows) == set(METHODS)
        for method, row in rows.items():
            sums = [mean_sum(method, keys, swept, i + 1) for i in range(4)]
            assert row["x"] == pytest.approx([count for count in sums if count], rel=1e-5)
    for method, row in rows_of(part, "cost").items():
        assert row["values"] == pytest.approx(
            [mean_sum(method, (key,), swept) for key in ("payload_up", "payload_down", "payload_one_off")]
        )
        took = rows_of(part, "cost", 1)[method]["values"]
        assert took == pytest.approx([mean_sum(method, (key,), swept) for key in ("wall_s", "cpu_s")], rel=1e-5)


def mean_sum(method: str, keys: Sequence[str], folder: Path, rounds: int = 4) -> float:
    """Return what a method's runs have of some keys in their first rounds, the mean over seeds."""
    return sum(record[key] for run in lines_of(folder, method) for record in run[:rounds] for key in keys) / len(SEEDS)


def cells_of(page: Path, column: str) -> dict[str, tuple[float, str]]:
    """Return the keys and the texts of a column of the tables of a page, by the first cell of its row."""
    found = {}
    for row in re.findall(r'<tr role="row">(<th scope="row".*?)</tr>', page.read_text("utf-8")):
        cells = re.findall(r'data-key="([^"]*)" data-label="([^"]*)">(.*?)</t[dh]>', row)
        found[cells[0][2]] = next(((float(key or "nan"), text) for key, label, text in cells if label == column), (math.nan, ""))
    return found


def test_tables_are_those_of_the_records(swept: Path) -> None:
    page = swept / "comparison.html"
    every, recurring = ("payload_up", "payload_down", "payload_one_off"), ("payload_up", "payload_down")
    total, without, gap, time = (cells_of(page, name) for name in ("total", "without the one-off", "largest gap", "time"))
    own_total, own_gap = cells_of(page, "total"), cells_of(page, "gap")
    for place, method in enumerate(METHODS):
        runs = lines_of(swept, method)
        last = [run[-1]["metrics"]["accuracy"] for run in runs]
        mean, error = statistics.mean(last), statistics.stdev(last) / math.sqrt(2)
        assert cells_of(page, "accuracy")[method] == (pytest.approx(mean), f"{mean:.3f} ± {error:.3f}")
        assert (total[method][0], without[method][0]) == (mean_sum(method, every, swept), mean_sum(method, recurring, swept))
        gaps = [max(record["exactness_gap"] or 0.0 for record in run) for run in runs]
        assert gap[method][0] == max(gaps)
        assert time[method][0] == pytest.approx(mean_sum(method, ("wall_s",), swept))
        for seed in SEEDS:
            number = str(1 + 2 * place + seed)
            assert own_gap[number][0] == gaps[seed]
            assert own_total[number][0] == sum(record[key] for record in runs[seed] for key in every)
            assert cells_of(page, "accuracy")[number] == (last[seed], f"{last[seed]:.3f}")


def test_gaps_epsilon_and_clients_are_those_of_the_records(swept: Path) -> None:
    [part] = data_of(swept / "comparison.html")
    for method, row in rows_of(part, "gap").items():
        gaps = [max(run[number]["exactness_gap"] for run in lines_of(swept, method)) for number in (1, 2, 3)]
        assert (row["x"], row["y"]) == ([1, 2, 3], pytest.approx(gaps, rel=1e-5))
    finals = [run[-1]["metrics"]["accuracy"] for run in lines_of(swept, "fedex_lora")]
    [(label, row)] = rows_of(part, "epsilon").items()
    assert (label, row["x"], row["y"]) == ("fedex_lora", [4.0], pytest.approx([statistics.mean(finals)], rel=1e-5))
    dots = rows_of(part, "clients")["fed_sb"]
    assert dots["x"] == pytest.approx([0.5, 0.51, 0.6, 0.61])
    assert dots["names"] == ["client-0, run 1", "client-0, run 2", "client-1, run 1", "client-1, run 2"]
    assert dots["mean"] == pytest.approx(0.555)


def test_a_line_joins_a_methods_groups_by_epsilon(tmp_path: Path) -> None:
    asked = [(method, epsilon) for method in ("fed_sb", "fedavg_lora") for epsilon in (8.0, 1.0, 3.0)]
    runs = [make_folder(tmp_path / f"{m}-{e}-{seed}", m, seed, epsilon=e - 0.1, asked=e) for m, e in asked for seed in SEEDS]
    [part] = data_of(page_of(runs, tmp_path / "out"))
    chart = next(each for each in part["charts"] if each["key"] == "epsilon")
    joined = {link["name"]: [part["groups"][g]["label"] for g in link["of"]] for link in chart["links"]}
    assert joined == {method: [f"{method} epsilon {e}" for e in (1.0, 3.0, 8.0)] for method in ("fed_sb", "fedavg_lora")}
    [alone] = data_of(page_of(runs[:2], tmp_path / "alone"))
    assert next(each for each in alone["charts"] if each["key"] == "epsilon")["links"] == []


def test_page_and_markdown_show_the_same_differences(swept: Path) -> None:
    [part] = data_of(swept / "comparison.html")
    told = {row[0]: row[-1].strip("*") for row in table_after("Differences", (swept / "comparison.md").read_text())[1:]}
    page = (swept / "comparison.html").read_text("utf-8")
    for method, row in rows_of(part, "differences").items():
        shown = [float(text) for text in re.findall(r"[+-][\d.]+", told[method])]
        assert shown == pytest.approx([row["v"], *row["i"]], abs=5.1e-4)
        assert told[method] in page
    assert "From runs 1–6." in next(each["caption"] for each in part["charts"] if each["key"] == "differences")


def test_a_partition_is_a_picture_and_a_private_run_has_none(swept: Path, tmp_path: Path) -> None:
    page = (swept / "comparison.html").read_text("utf-8")
    assert 'title="client-0, business: 75.0%, 30 of 40"' in page
    assert "2 clients, 50 examples, label skew 0.25. From runs 1–4." in page
    private = [make_folder(tmp_path / f"p{seed}", "fed_sb", seed, epsilon=2.0) for seed in SEEDS]
    text = page_of(private, tmp_path).read_text("utf-8")
    assert "No run says how its examples are dealt out" in text
    assert "business" not in text.replace(LIBRARY.read_text("utf-8"), "")


@pytest.mark.parametrize(
    ("by", "said"),
    [
        ({"dealt_by": "quantity", "size_skew": 0.3}, "50 examples, label skew 0.25, size skew 0.30. From runs 1."),
        (
            {"dealt_by": "length", "size_skew": 0.3, "group_skew": 0.5, "groups": ["short"], "group_shares": {"client-0": [1.0]}},
            "50 examples, label skew 0.25, length skew 0.50. From runs 1.",
        ),
    ],
)
def test_a_partition_beyond_labels_tells_its_skew(by: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run", "fed_sb", 0)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "partition": {**summary["partition"], **by}}))
    assert said in page_of([folder], tmp_path).read_text("utf-8")


def test_a_page_asks_no_network_and_holds_the_library_that_it_names(swept: Path) -> None:
    page = (swept / "comparison.html").read_text("utf-8")
    library = LIBRARY.read_text("utf-8")
    assert library in page
    own = page.replace(library, "")
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//|@import|url\(|fetch\(|XMLHttp|import\(""", own)
    told = (LIBRARY.parent / "VERSION").read_text("utf-8")
    assert hashlib.sha256(LIBRARY.read_bytes()).hexdigest() in told
    assert re.search(r"v(\d+\.\d+\.\d+)", library[:200])[1] in told  # type: ignore[index]
    assert "Permission is hereby granted" in (LIBRARY.parent / "LICENSE").read_text("utf-8")
    assert len(page.encode()) < 2_000_000


def test_text_of_a_run_stays_text(tmp_path: Path) -> None:
    folders = [make_folder(tmp_path / f"<b>{seed}", "fed_sb", seed) for seed in SEEDS]
    for folder, name in zip(folders, ("</script><b>x", "fed_sb"), strict=True):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump({**config, "method": {"name": name}}))
        (folder / "summary.json").write_text(json.dumps({**summary, "method": name}))
    page = page_of(folders, tmp_path)
    assert "<b>" not in page.read_text("utf-8").replace(LIBRARY.read_text("utf-8"), "")
    assert data_of(page)[0]["groups"][0]["label"].startswith("</script><b>x")


def test_runs_over_other_data_are_shown_apart_and_warned_of(tmp_path: Path) -> None:
    folders = [
        make_folder(tmp_path / data / f"{m}-{s}", m, s, data=data) for data in ("bbc_news", "other") for m in METHODS[:2] for s in SEEDS
    ]
    *_, comparison, page = write_reports(folders, tmp_path / "out")
    warning = "These runs are over different data**, shown apart and not held against each other: bbc_news (4 runs); other (4 runs)."
    assert warning in comparison.read_text()
    assert "## Differences: bbc_news" in comparison.read_text()
    parts = data_of(page)
    assert [[group["runs"] for group in part["groups"]] for part in parts] == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    assert page.read_text("utf-8").count("<p class=warning><strong>These runs are over different data</strong>") == 1
    assert re.findall(r"<h2>(.*?)</h2>", page.read_text("utf-8")) == ["Data: bbc_news", "Data: other"]


def test_files_of_one_name_and_other_content_are_other_data(tmp_path: Path) -> None:
    """Two sweeps over a file that was changed between them: only their manifests tell."""
    folders = []
    for name, content in (("a", "1" * 64), ("b", "2" * 64)):
        folders += [make_folder(tmp_path / name / f"fed_sb-{seed}", "fed_sb", seed) for seed in SEEDS]
        (tmp_path / name / "manifest.json").write_text(json.dumps({"data": {"bbc_news": content}, "jobs": []}))
    text = write_reports(folders)[-2].read_text()
    assert f"bbc_news content {'1' * 12} (2 runs); bbc_news content {'2' * 12} (2 runs)" in text
    assert page_of(folders[:2], tmp_path).read_text("utf-8").count("These runs are over different data") == 0


def test_a_run_under_way_is_on_the_page(make_run: Maker, tmp_path: Path) -> None:
    folders = [make_run("a"), make_run("b", "fedavg_lora", finished=False)]
    page = page_of(folders, tmp_path)
    [part] = data_of(page)
    assert [group["label"] for group in part["groups"]] == ["fed_sb", "fedavg_lora (not finished)"]
    assert set(rows_of(part, "quality")) == {"fed_sb", "fedavg_lora (not finished)"}
    assert "1 run did not finish." in page.read_text("utf-8")


def test_many_rounds_leave_the_page_small(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.write_config(yaml.safe_dump({"method": {"name": "fed_sb"}}))
    (folder.path / "metrics.jsonl").write_text("".join(record.to_json() + "\n" for record in make_records(rounds=1000)))
    row = rows_of(data_of(page_of([folder.path], tmp_path))[0], "quality")["fed_sb (not finished)"]
    assert (row["x"][0], row["x"][-1], len(row["x"])) == (0, 1000, 400)


@given(st.integers(1, 5000))
def test_points_a_line_keep_a_page_within_its_budget(groups: int) -> None:
    assert points_a_line(groups) == FEWEST or points_a_line(groups) * groups * A_ROUND <= MOST_NUMBERS


@given(st.lists(st.integers(), min_size=1), st.integers(2, 30))
def test_thinned_points_are_in_order_and_keep_both_ends(points: list[int], most: int) -> None:
    kept = thinned(list(enumerate(points)), most)
    assert len(kept) == min(most, len(points))
    assert kept == sorted(set(kept), key=lambda pair: pair[0])
    assert (kept[0], kept[-1]) == ((0, points[0]), (len(points) - 1, points[-1]))


@given(st.sets(st.integers(1, 40), min_size=1))
def test_ranges_name_each_number_once(numbers: set[int]) -> None:
    spelt = [re.split("–", part) for part in ranges_text(numbers).split(", ")]
    assert [n for part in spelt for n in range(int(part[0]), int(part[-1]) + 1)] == sorted(numbers)


def test_a_run_alone_has_a_page_of_its_own(swept: Path, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a run", "fed_sb", 0)
    written, page = write_reports([folder])
    assert (written, page) == (folder / "report.md", folder / "report.html")
    [part] = data_of(page)
    assert [chart["key"] for chart in part["charts"]] == ["quality", "bytes", "gap", "clients", "cost"]
    assert rows_of(part, "quality")["fed_sb"]["y"] == [0.214, 0.806, 0.897, 0.923]
    assert "<title>Run a run</title>" in page.read_text("utf-8")
    assert 'href="report.md"' in page.read_text("utf-8")
    assert len(page.read_bytes()) < 2_000_000


def test_a_figure_of_two_methods_is_from_the_runs_of_both(swept: Path, tmp_path: Path) -> None:
    found = [swept / name for name in ("fedavg_lora-0", "fedavg_lora-1", "fed_sb-0", "fed_sb-1")]
    charts = data_of(page_of(found, tmp_path))[0]["charts"]
    assert "From runs 1–4." in next(each["caption"] for each in charts if each["key"] == "differences")


def test_what_clients_measure_is_said_not_to_be_held_against_the_rest(swept: Path, tmp_path: Path) -> None:
    own = make_folder(tmp_path / "own", "fed_sb", 0)
    for number in range(4):
        retold(own, lambda record: record.update(measured_by="clients"), number)
    page = page_of([own, swept / "fedavg_lora-0"], tmp_path)
    said = {each["key"]: each["caption"] for each in data_of(page)[0]["charts"]}
    told = "Not to be held against the others: fed_sb"
    assert [told in said[key] for key in ("quality", "bytes", "gap")] == [True, True, False]
    assert told in page.read_text("utf-8").partition("<h2>")[0]


def test_the_round_that_was_chosen_is_told_of_a_run_too(tmp_path: Path) -> None:
    """By `eval.select`: the table of runs is not to tell of another round than that of methods."""
    folder = make_folder(tmp_path / "run", "fed_sb", 0)
    summary = json.loads((folder / "summary.json").read_text())
    chosen = {"round": 2, "metric": "loss", "direction": "lower", "value": 0.1, "stopped": False}
    (folder / "summary.json").write_text(json.dumps({**summary, "selected": chosen}))
    page = page_of([folder], tmp_path).read_text("utf-8")
    assert re.findall(r'data-key="([\d.]+)" data-label="accuracy"', page) == ["0.897", "0.897"]
