"""The tables of language models: every cell composes, a cell is run once, and what is printed is what the runs hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsb.config.compose import load
from fedsb.report.intervals import wilson
from fedsb.run.folder import read_run
from scripts.bench.language_cells import CONTESTANTS, SHARED, TABLES, cell, fill, finished
from scripts.bench.language_rows import cell_of, gains_of, markdown, row_of
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
    row, (first, *_, last) = row_of("fedavg_lora", [cell_of(run)] * 2), run.records
    assert gains_of(row) == [first.metrics["loss"] - last.metrics["loss"]] * 2
    untouched, trained = markdown([row]).splitlines()[2:]
    right, count = last.metrics["exact_match"], int(last.metrics["examples"])  # those that both seeds are asked
    low, high = wilson(right, count)
    assert f"| {right:.3f} [{low:.3f}, {high:.3f}] |" in trained
    assert trained.startswith(f"| fedavg_lora | {last.metrics['loss']:.3f} ({last.metrics['loss']:.3f}, {last.metrics['loss']:.3f}) |")
    assert untouched.startswith(f"| untouched base | {first.metrics['loss']:.3f} ")


def test_a_cell_without_a_checkpoint_is_begun_again_and_nothing_is_lost(tmp_path: Path) -> None:
    folder = tmp_path / "fed_sb-s0"
    folder.mkdir()
    (folder / "config.yaml").write_text("begun")
    fill(folder, ["no.such.key=1"])
    assert not folder.exists()
    assert [path.read_text() for path in tmp_path.glob("fed_sb-s0.ended-*/config.yaml")] == ["begun"]
    assert "no.such.key" in (tmp_path / "fed_sb-s0.log").read_text()
