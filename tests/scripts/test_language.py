"""The tables of language models: every cell composes, a cell is run once, and what is printed is what the runs hold."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from fedsb.config.compose import load
from fedsb.data import load_corpus
from fedsb.data.reasoning import made_rows
from fedsb.report.intervals import wilson
from fedsb.run.folder import RunFolder, read_run
from fedsb.run.predictions import Predictions, write_predictions
from fedsb.run.records import RoundRecord
from scripts.bench.answering.cache import keep, kept, rows_of
from scripts.bench.answering.cells import CONTESTANTS, SHARED, TABLES, cell, fill, finished
from scripts.bench.answering.rows import cell_of, gains_of, markdown, row_of
from scripts.bench.answering.rows import table as cells_of
from tests.app.runs import QUICK
from tests.conftest import FILLERS


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_every_cell_composes_and_sees_as_many_examples(contestant: str, table: str) -> None:
    config = load([*TABLES[table].overrides, *SHARED, *CONTESTANTS[contestant]])
    rows = config.data.max_examples or config.data.task_rows * len(config.data.tasks)
    assert (rows, config.federation.num_rounds, config.train.local_epochs) == (800, 2, 1)


def test_contestants_have_folders_of_their_own() -> None:
    names = {cell(contestant, seed) for contestant in CONTESTANTS for seed in (0, 1)}
    assert len(names) == 2 * len(CONTESTANTS)
    assert all(name.replace("-", "").replace("_", "").isalnum() for name in names)


@pytest.mark.slow
def test_a_cell_is_run_once_and_its_line_holds_what_its_records_do(tmp_path: Path, tiny_llama: Path) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(f'{{"q": "{a} {b}", "a": "goal"}}\n' for a in FILLERS[:5] for b in FILLERS[:5]))
    files = ["data=files", f"data.path='{path}'", "data.task=causal_lm", "data.prompt=q", "data.response=a"]
    asked = [*QUICK, *files, "model=pretrained", f"model.name='{tiny_llama}'"]
    folder = tmp_path / "table" / cell("fedavg_lora", 0)
    fill(folder, asked)
    assert finished(folder), folder.with_suffix(".log").read_text()[-2000:]
    written = folder.with_suffix(".log").read_text(), (folder / "metrics.jsonl").read_text()
    fill(folder, asked)
    assert written == (folder.with_suffix(".log").read_text(), (folder / "metrics.jsonl").read_text())
    run = read_run(folder)
    row, (first, *_, last) = row_of("fedavg_lora", dict.fromkeys((0, 1), cell_of(run))), run.records
    assert gains_of(row) == [first.metrics["loss"] - last.metrics["loss"]] * 2
    untouched, trained = markdown([row]).splitlines()[2:]
    right, count = last.metrics["exact_match"], int(last.metrics["examples"])  # those that both seeds are asked
    low, high = wilson(right, count)
    assert f"| {right:.3f} [{low:.3f}, {high:.3f}] |" in trained
    assert trained.startswith(f"| fedavg_lora | {last.metrics['loss']:.3f} |")
    assert untouched.startswith(f"| untouched base | {first.metrics['loss']:.3f} ")


def test_a_cell_without_a_checkpoint_is_begun_again_and_nothing_is_lost(tmp_path: Path) -> None:
    folder = tmp_path / "fed_sb-s0"
    folder.mkdir()
    (folder / "config.yaml").write_text("begun")
    fill(folder, ["no.such.key=1"])
    assert not folder.exists()
    assert [path.read_text() for path in tmp_path.glob("fed_sb-s0.ended-*/config.yaml")] == ["begun"]
    assert "no.such.key" in (tmp_path / "fed_sb-s0.log").read_text()


def ended(folder: Path, **failed: str) -> Path:
    """Write what a run of two rounds leaves that tables read."""
    made = RunFolder(folder)
    made.append(RoundRecord(0, metrics={"loss": 2.0}))
    made.append(RoundRecord(1, clients=("client-0",), failed=failed, metrics={"loss": 1.5}, held_gap=0.14))
    made.append(RoundRecord(2, clients=("client-0", "client-1"), metrics={"loss": 1.0}, held_gap=0.1))
    told = {"metrics": {"loss": 1.0}, "rank": 8, "trained_params": 5, "wall_s": 70.0}  # by every summary
    made.write_summary({**told, "payload_total": 10, "payload_one_off": 1, "exactness_gap": 1e-8, "held_gap": 0.14, "cpu_s": 60.0})
    return folder


def test_a_run_that_lost_a_reply_is_no_cell_and_is_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its clients trained on less than those of other cells; by a script that had not looked, it was a cell like any other."""
    cache, table = tmp_path / "cache.json", tmp_path / "sums"
    whole, short = ended(table / "fed_sb-s0"), ended(table / "flora-s1", **{"client-1": "no reply in time"})
    keep(cache, "sums", table)
    why = "no cell, round 1 had no reply of client-1 (no reply in time)"
    assert capsys.readouterr().out == f"sums/flora-s1: {why}\n"
    assert list(kept(cache)) == ["sums/fed_sb-s0"]
    with pytest.raises(ValueError, match=r"flora-s1' lost replies of client-1: it is no cell$"):
        cell_of(read_run(short))
    for folder in (whole, short):
        fill(folder, ["no.such.key=1"])
    assert finished(whole)
    assert not short.exists()
    assert len([*table.glob("flora-s1.ended-*/summary.json")]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == [f"flora-s1: {why}; it is run again", "flora-s1: begins"]
    assert out[2].startswith("flora-s1: ended with status 2")


def test_a_cell_keeps_the_gap_of_the_weights_that_clients_compute_with(tmp_path: Path) -> None:
    found = cell_of(read_run(ended(tmp_path / "run")))
    assert (found["gap"], found["held_gap"]) == (1e-8, 0.14)
    older = {key: value for key, value in found.items() if key != "held_gap"}
    lines = [markdown([row_of("fedex_lora", cells)]).splitlines()[-1].split(" | ")[-2] for cells in ({0: found, 1: older}, {0: older})]
    assert lines == ["1.0e-08, held 1.4e-01", "1.0e-08"]


def test_a_cell_keeps_the_exact_match_of_each_task(tmp_path: Path) -> None:
    """Of the rows as reasoning-gym makes them, a task's together; nothing where only some of them were asked."""
    config = load(TABLES["sums"].overrides)
    tasks, rows = list(config.data.tasks), config.data.task_test_rows
    made = made_rows(data := replace(config.data, task_rows=2))[1]
    assert list(made["task"]) == [task for task in tasks for _ in range(rows)]
    assert [json.loads(row)["prompt"] for row in load_corpus(data, 1).test.texts] == list(made["prompt"])
    folder = ended(tmp_path / "run")
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"tasks": tasks, "task_test_rows": 4}}))
    for right, by_task in (([1, 1, 1, 0, 0, 0, 1, 0], dict(zip(tasks, (0.75, 0.25), strict=True))), ([1, 0, 1], None)):
        write_predictions(folder, Predictions(2, "", {"exact_match": np.array(right, np.uint8)}))
        assert cell_of(read_run(folder)).get("by_task") == by_task
    metrics = {"loss": 1.0, "exact_match": 0.5, "parse_failures": 0.0, "chance": 0.1, "examples": 8.0}
    cell = {**cell_of(read_run(folder)), "untouched": metrics, "trained": metrics, "by_task": {"a": 0.75, "b": 0.25}}
    assert "; a 0.750; b 0.250 | " in markdown([row_of("x", {0: cell, 1: {**cell, "by_task": {"b": 0.25, "a": 0.75}}})])
    assert "; a" not in markdown([row_of("x", {0: cell, 1: {key: value for key, value in cell.items() if key != "by_task"}})])


def test_a_contestant_with_fewer_seeds_than_others_says_which() -> None:
    cell = {"untouched": {"loss": 2.0}, "trained": {"loss": 1.0}, "bytes": 1, "one_off": 0, "gap": None, "cpu_s": 60.0}
    rows = [row_of("one", {1: cell}), row_of("two", {0: cell, 1: {**cell, "trained": {"loss": 1.5}}})]
    assert [line[1:3] for line in cells_of(rows)[3:]] == [
        ["1.000 (seed 1)", "1.000 (seed 1)"],
        ["1.250 (1.000, 1.500)", "0.750 (1.000, 0.500)"],
    ]


DOCS = Path("docs")


def stated() -> list[list[list[str]]]:
    """Return the tables of the section on language models, by line and cell."""
    section = (DOCS / "figures.md").read_text().split("## Fine-tuned language models")[1].split("\n## ")[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()] for table in tables]


@pytest.mark.parametrize(("number", "name"), [*enumerate(TABLES)])
def test_the_documents_tables_say_what_the_runs_did(number: int, name: str) -> None:
    """Each cell, computed again from the runs that are kept; a seed that is not there yet is said."""
    head, _, *lines = stated()[number]
    own, _, *computed = cells_of(list(rows_of(name, kept(DOCS / "language.json"))))
    assert set(head) <= set(own)
    assert [line[0].replace("`", "").replace("frozen.hold=merge", "merged") for line in lines] == [line[0] for line in computed]
    for line, right in zip(lines, computed, strict=True):
        assert line[1:] == [right[own.index(column)] for column in head[1:]], line[0]


def test_the_documents_bounds_are_those_of_the_runs() -> None:
    rows = list(rows_of("gsm8k", kept(DOCS / "language.json")))
    least = {row["contestant"]: f"{min(gains_of(row)):.3f}" for row in rows}
    assert f"**{least['fedex_lora']}** and **{least['fed_sb']}**" in (DOCS / "figures.md").read_text()
