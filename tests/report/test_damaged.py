"""What a report makes of runs that broke: a metric that is no number, files that are damaged, and data that are not the same."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from fedsb.core.errors import UserError
from fedsb.report.datasets import by_data
from fedsb.report.folders import write_reports
from fedsb.run.folder import TOLD, read_run
from tests.report.made import Maker, make_records
from tests.report.pages import data_of, make_folder, make_sweep, page_of, retold, rows_of
from tests.report.test_report import table_after


def test_a_run_that_has_diverged_is_not_left_out_of_its_methods_mean(tmp_path: Path) -> None:
    """A mean over the seeds that went well would make of a method that breaks at every other seed a good one."""
    folders = make_sweep(tmp_path / "sweep")
    retold(folders[1], lambda record: record["metrics"].update(accuracy=None, loss=None))
    text = write_reports([tmp_path / "sweep"])[-2].read_text()
    page = (tmp_path / "sweep" / "comparison.html").read_text("utf-8")
    told = "fed_sb: accuracy is no number in 1 of 2 runs, so that it has no mean."
    assert told in text
    assert told in page
    assert {row[0]: row[2] for row in table_after("Differences", text)[1:]}["fed_sb"] == "–"
    assert re.search(r'data-key="fed_sb".*?data-key="" data-label="accuracy">–<', page)
    assert rows_of(data_of(tmp_path / "sweep" / "comparison.html")[0], "quality")["fed_sb"]["x"] == [0, 1, 2]


def test_a_client_that_has_diverged_stops_no_report(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run", "fed_sb", 0)
    retold(folder, lambda record: record["client_metrics"]["client-1"].update(accuracy=None))
    written, page = write_reports([folder])
    assert table_after("Clients", written.read_text())[1] == ["accuracy", "nan", "nan", "nan", "nan", "nan (client-1)"]
    dots = rows_of(data_of(page)[0], "clients")["fed_sb"]
    assert (dots["names"], dots["mean"]) == (["client-0, run 1"], None)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.jsonl", '{"round": 0, "metr\n{"round": 1}\n'),
        ("metrics.jsonl", "\0\0\0\n"),
        ("metrics.jsonl", "{}\n"),
        ("metrics.jsonl", '{"round": 0, "payload_up": "many"}\n'),
        ("metrics.jsonl", '{"round": 0, "metrics": {"accuracy": "high"}}\n'),
        ("summary.json", ""),
        ("summary.json", "[]"),
        ("summary.json", "{}"),
        ("summary.json", json.dumps({**dict.fromkeys(TOLD, 1), "selected": {"a": 1}})),
        ("summary.json", json.dumps({**dict.fromkeys(TOLD, 1), "selected": "x"})),
        ("summary.json", json.dumps({**dict.fromkeys(TOLD, 1), "epsilon": {"a": 1}})),
        ("config.yaml", "a: ["),
        ("config.yaml", "- 1"),
    ],
)
def test_a_damaged_run_is_left_out_with_a_line_and_hides_no_other(
    make_run: Maker, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, text: str
) -> None:
    folders = [make_run(folder, seed=seed, records=make_records(rounds=1)) for seed, folder in enumerate("abc")]
    (folders[1] / name).write_text(text)
    with pytest.raises(UserError, match=f"b' holds a {re.escape(name)} that cannot be read"):
        write_reports(folders[1:2])
    text = write_reports([tmp_path])[-2].read_text()
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"'{folders[1]}' holds a {name} that cannot be read (")
    assert line.endswith("): left out")
    assert f"**Left out**: '{folders[1]}' holds a {name} that cannot be read" in text
    assert len(table_after("Results", text)) == 3
    assert "<strong>Left out</strong>" in (tmp_path / "comparison.html").read_text("utf-8")


def test_records_that_are_torn_or_lost_hide_no_other_run(tmp_path: Path) -> None:
    folders = make_sweep(tmp_path / "sweep")
    text = (folders[0] / "metrics.jsonl").read_text()
    (folders[0] / "metrics.jsonl").write_text(text[:40])
    (folders[1] / "metrics.jsonl").unlink()
    told = write_reports([tmp_path / "sweep"])[-2].read_text()
    assert f"'{folders[0]}' holds a metrics.jsonl without one whole line" in told
    assert f"'{folders[1]}' holds a summary.json and no metrics.jsonl" in told


@pytest.mark.parametrize("text", ['{"jobs": [', "[]", '{"jobs": [{}]}', "\0"])
def test_a_manifest_that_cannot_be_read_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json' can't be read \(.*\); restore it, or name the runs' folders$"):
        write_reports([tmp_path])


def test_predictions_that_cannot_be_read_leave_the_rest_of_a_comparison(tmp_path: Path) -> None:
    folders = make_sweep(tmp_path / "sweep")
    (folders[0] / "predictions.safetensors").write_bytes(b"cut")
    page = page_of(folders, tmp_path).read_text("utf-8")
    assert "not paired: fed_sb has kept no predictions that can be read: run it again" in page


def test_runs_over_other_data_share_no_table_of_seeds_and_no_figure(tmp_path: Path) -> None:
    """Of equal settings, so that their labels are the same too: only manifests tell."""
    for name, seeds in (("a", (0, 1)), ("b", (0, 2))):
        for seed in seeds:
            make_folder(tmp_path / name / f"fed_sb-{seed}", "fed_sb", seed)
        (tmp_path / name / "manifest.json").write_text(
            json.dumps({"data": {"bbc_news": name * 64}, "jobs": [{"name": f"fed_sb-{seed}"} for seed in seeds]})
        )
    text = write_reports([tmp_path / "a", tmp_path / "b"], tmp_path / "out")[-2].read_text()
    for name in "ab":
        assert [row[1] for row in table_after(f"Over seeds: bbc_news content {name * 12}", text)[1:]] == ["2"]
    with (tmp_path / "out" / "comparison.csv").open(encoding="utf-8", newline="") as file:
        assert [row["data"] for row in csv.DictReader(file)] == [f"bbc_news content {name * 12}" for name in "aabb"]
    assert {path.name for path in (tmp_path / "out").glob("comparison*.png")} == {"comparison.png", "comparison-2.png"}


def test_a_run_outside_of_a_sweep_is_over_the_data_that_its_settings_say(tmp_path: Path) -> None:
    """Nobody tells its hash; where two are known of these settings nobody knows which is its."""
    runs = [make_folder(tmp_path / name / "run", "fed_sb", seed) for seed, name in enumerate(("a", "b", "c"))]
    for name, content in (("a", "1" * 64), ("c", "2" * 64)):
        (tmp_path / name / "manifest.json").write_text(json.dumps({"data": {"bbc_news": content}, "jobs": []}))
    found = [read_run(run) for run in runs]
    assert [len(part) for part in by_data(found[:2]).values()] == [2]
    assert [len(part) for part in by_data(found).values()] == [1, 1, 1]
