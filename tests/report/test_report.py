"""The report and its plots come from the folder alone, again and again, whatever the folder lacks."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from fedsb.core.errors import UserError
from fedsb.privacy.claim import Claim
from fedsb.report.comparison import write_comparison
from fedsb.report.folders import write_reports
from fedsb.report.labels import run_labels
from fedsb.report.plots import compare, plot_run
from fedsb.report.report import report_text, write_report
from fedsb.report.series import curve
from fedsb.run.folder import read_run
from fedsb.run.records import RoundRecord
from tests.report.made import Maker, make_records, make_summary

SECTIONS = ["What ran", "Rounds", "Clients", "Communication", "Exactness", "Privacy", "Failures", "Versions"]


def colours(path: Path) -> int:
    """Count the colours that cover enough of a picture to be seen."""
    with Image.open(path) as image:
        counts = image.convert("RGB").getcolors(maxcolors=2**24)
    return sum(count >= 40 for count, _ in counts or [])


def images(report: Path) -> list[Path]:
    """Return the pictures that a report shows."""
    return [report.parent / name for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", report.read_text())]


def table_after(heading: str, text: str) -> list[list[str]]:
    """Return the cells of the first table under a heading, without its ruler."""
    lines = [line for line in text.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in (lines[0], *lines[2:])]


def test_every_plot_shows_something(make_run: Maker) -> None:
    paths = plot_run(make_run())
    assert [path.name for path in paths] == ["quality.png", "bytes.png", "quality_against_bytes.png", "exactness.png"]
    assert all(colours(path) >= 4 for path in paths)


def test_a_plot_without_data_is_left_out(make_run: Maker) -> None:
    records = [RoundRecord(number, metrics={"loss": 1.0 / (number + 1)}) for number in range(3)]
    assert [path.name for path in plot_run(make_run(records=records))] == ["quality.png"]
    assert plot_run(make_run("bare", records=[RoundRecord(0)])) == []


def test_rounds_without_an_evaluation_leave_dashes_and_no_gaps(make_run: Maker) -> None:
    """A line is drawn from one evaluation to the next: a NaN between them would break it to pieces."""
    records = [replace(record, metrics=record.metrics if record.round in (0, 3, 4) else {}) for record in make_records(rounds=4)]
    assert curve(records, "loss", [record.round for record in records]) == ([0, 3, 4], [1.61, 1.2 / 4, 1.2 / 5])
    run = make_run(records=records)
    assert [path.name for path in plot_run(run)] == ["quality.png", "bytes.png", "quality_against_bytes.png", "exactness.png"]
    shown = table_after("Rounds", write_report(run).read_text())
    assert [row[shown[0].index("accuracy")] for row in shown[1:]] == ["0.214", "–", "–", "0.923", "0.931"]


def test_the_report_has_every_section_and_shows_its_plots(make_run: Maker) -> None:
    report = write_report(make_run())
    text = report.read_text()
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == SECTIONS
    assert len(images(report)) == 4
    assert all(path.is_file() for path in images(report))
    assert "**No privacy mechanism: epsilon is not claimed.**" in text
    assert "Do not describe this run as private" in text
    assert ["2", "client-7", "reply holds NaN in R of 'encoder.layer.0'"] in table_after("Failures", text)


def test_the_report_says_which_options_of_a_method_ran(make_run: Maker) -> None:
    folder = make_run()
    assert "options of" not in write_report(folder).read_text()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["method"]["options"] = {"energy": None, "split": "balanced", "strength": 0.5}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert ["options of the method", "split balanced, strength 0.5"] in table_after("What ran", write_report(folder).read_text())


def test_the_table_has_a_row_a_round_of_equal_width(make_run: Maker) -> None:
    head, *body = table_after("Rounds", report_text(read_run(make_run(method="fedex_lora"))))
    assert [row[0] for row in body] == ["0", "1", "2", "3"]
    assert {len(row) for row in body} == {len(head)}
    assert head.index("residual_rank") == len(head) - 2
    assert body[1][head.index("residual_rank")] == "72"


def test_totals_stand_with_and_without_the_one_off(make_run: Maker) -> None:
    rows = {row[0]: row[1] for row in table_after("Communication", report_text(read_run(make_run())))}
    assert rows["**total with the one-off**"] == "4,976,640"
    assert rows["total without the one-off"] == "552,960"


def test_the_report_is_made_again_from_the_folder_alone(make_run: Maker, tmp_path: Path) -> None:
    folder = make_run()
    first = write_report(folder).read_text()
    for path in [folder / "report.md", *folder.glob("*.png")]:
        path.unlink()
    assert write_report(folder).read_text() == first
    (moved := tmp_path / "elsewhere").mkdir()
    folder.rename(moved / "run")
    assert write_report(moved / "run").read_text() == first


def test_an_unfinished_run_is_reported_as_such(make_run: Maker) -> None:
    text = report_text(read_run(make_run(finished=False, records=make_records()[:2])))
    assert "**This run did not finish**: its folder holds 1 of 3 rounds" in text
    assert "none is claimed" in text


@pytest.mark.parametrize("simulated", [True, False])
def test_an_epsilon_is_told_with_what_it_leaves_out(simulated: bool, make_run: Maker) -> None:
    folder = make_run(finished=False)
    accounts = {"a": account(3.0), "b": account(2.5)}
    epsilon = Claim("example", "prv", None, accounts=accounts).final(simulated=simulated)
    summary = make_summary(make_records()) | {"epsilon": epsilon, "epsilon_reason": None}
    (folder / "summary.json").write_text(json.dumps(summary))
    text = report_text(read_run(folder))
    assert "Epsilon is **at most 3.00, at least 2.50 per example at delta 1.0e-05" in text
    assert "Not covered: a person with several examples" in text
    assert ("comes from the seed" in text) is simulated


def test_a_missing_epsilon_is_told_with_its_own_reason(make_run: Maker) -> None:
    folder = make_run(finished=False)
    (folder / "summary.json").write_text(json.dumps(make_summary(make_records()) | {"epsilon_reason": "the start was not noised"}))
    text = report_text(read_run(folder))
    assert "**Epsilon is not claimed**: the start was not noised." in text
    assert "No privacy mechanism" not in text


def test_a_reason_with_a_pipe_or_a_line_break_stays_in_its_cell(make_run: Maker) -> None:
    records = [RoundRecord(1, failed={"a|b": "bad\n| value"}, metrics={"accuracy": 0.5})]
    assert ["1", r"a\|b", r"bad \| value"] in table_after("Failures", report_text(read_run(make_run(records=records))))


def test_what_happened_to_the_nodes_is_told_below_the_failures(make_run: Maker) -> None:
    records = [RoundRecord(1, metrics={"accuracy": 0.5}, remarks=("a: node 2 serves it in place of node 1, which has gone",))]
    assert "No reply was lost or dropped.\n\n- Round 1: a: node 2 serves it in place" in report_text(read_run(make_run(records=records)))


def test_runs_are_compared_in_one_figure(make_run: Maker, tmp_path: Path) -> None:
    folders = [make_run("a"), make_run("b", "fedavg_lora", rank=8, shift=0.03), make_run("c", "fedex_lora", rank=8, finished=False)]
    path = compare([read_run(folder) for folder in folders], tmp_path / "new" / "comparison.png")
    assert colours(path) >= 6


def test_labels_name_what_differs_and_are_never_alike(make_run: Maker) -> None:
    runs = [read_run(make_run(name, seed=seed)) for name, seed in (("a", 0), ("b", 1), ("c", 1))]
    assert run_labels(runs) == ["fed_sb seed 0", "fed_sb seed 1 (b)", "fed_sb seed 1 (c)"]


def test_a_run_without_adapters_has_no_rank_in_its_name(make_run: Maker) -> None:
    bare = read_run(make_run("bare", "fedavg_lora", rank=1))
    runs = [read_run(make_run("a", rank=4)), replace(bare, summary={**(bare.summary or {}), "rank": None})]
    assert run_labels(runs) == ["fed_sb rank 4", "fedavg_lora"]


def test_a_comparison_goes_to_the_first_parent_or_where_it_is_told(make_run: Maker, tmp_path: Path) -> None:
    folders = [make_run("a"), make_run("b", "fedavg_lora", rank=8)]
    comparison = write_comparison(folders)
    assert comparison == tmp_path / "comparison.md"
    assert write_comparison(folders, tmp_path / "x") == tmp_path / "x" / "comparison.md"
    assert images(comparison) == [tmp_path / "comparison.png", tmp_path / "quality_against_bytes.png"]
    assert table_after("Settings that differ", comparison.read_text()) == [
        ["setting", "fed_sb rank 16", "fedavg_lora rank 8"],
        ["`method.name`", "fed_sb", "fedavg_lora"],
        ["`rank`", "16", "8"],
    ]


def test_each_run_is_reported_and_only_several_are_compared(make_run: Maker, tmp_path: Path) -> None:
    folders = [make_run(name, records=[RoundRecord(0)]) for name in "ab"]
    assert write_reports(folders[:1]) == [folders[0] / "report.md", folders[0] / "report.html"]
    assert write_reports(folders) == [folders[1] / "report.md", tmp_path / "comparison.md", tmp_path / "comparison.html"]


def test_a_folder_of_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        write_reports([tmp_path])
    assert list(tmp_path.iterdir()) == []


def account(epsilon: float, **more: float) -> dict[str, float]:
    return {"epsilon": epsilon, "delta": 1e-5, "noise-multiplier": 1.25, **more}


def private_records(clients: int = 3, rounds: int = 2, **more: float) -> list[RoundRecord]:
    """Make the records of a private simulation."""
    accounts = {f"client-{i:02d}": account(1 + i / 100, **more) for i in range(clients)}
    spread = {"delta": 1e-5, "max": 1 + (clients - 1) / 100, "min": 1.0, "noise_multiplier": {"max": 1.25, "min": 1.25}}
    epsilon = {"unit": "example", "target": None, "accountant": "prv", "simulated": True, "clients": accounts, "silent": [], **spread}
    noted = {"clip_rate": 0.5, "signal_to_noise": 0.1}
    return [
        RoundRecord(n, metrics={"loss": 1.0}, epsilon=epsilon if n else None, simulation_only=noted if n else {}) for n in range(rounds)
    ]


def test_clients_are_listed_with_their_accounts_the_largest_epsilon_first(make_run: Maker) -> None:
    run = read_run(make_run(finished=False, records=private_records(23, **{"sampling-rate": 0.25, "steps": 4.0})))
    head, *body = table_after("Privacy", report_text(run))
    assert head == ["client", "epsilon", "delta", "noise multiplier", "sampling rate", "steps a round"]
    assert [row[0] for row in body] == [f"client-{i:02d}" for i in range(22, 2, -1)]
    assert body[0] == ["client-22", "1.22", "1e-05", "1.25", "0.25", "4"]
    assert "\n\nand 3 more\n" in report_text(run)


def test_a_list_that_is_whole_has_no_rest_and_a_column_that_nobody_has_is_left_out(make_run: Maker) -> None:
    text = report_text(read_run(make_run(finished=False, records=private_records(20))))
    head, *body = table_after("Privacy", text)
    assert head == ["client", "epsilon", "delta", "noise multiplier"]
    assert len(body) == 20
    assert " more\n" not in text.split("## Privacy")[1]


def test_an_unfinished_private_run_tells_its_last_epsilon(make_run: Maker) -> None:
    records = [*private_records(), RoundRecord(2, failed={"client-00": "lost"})]
    text = report_text(read_run(make_run(finished=False, records=records)))
    assert "none is claimed. The last known, after round 1, is at most 1.02, at least 1.00 per example at delta 1.0e-05" in text


def test_clip_rate_and_signal_to_noise_are_drawn_where_a_simulation_noted_them(make_run: Maker) -> None:
    folder = make_run(records=private_records())
    text = write_report(folder).read_text()
    assert "![noise](noise.png)\n\n*Simulation only: " in text.split("## Privacy")[1].split("## Failures")[0]
    assert "noise.png" not in text.split("## Privacy")[0]
    assert colours(folder / "noise.png") >= 4


def test_a_run_of_secure_sums_says_from_whom_they_protect_and_what_they_round(make_run: Maker) -> None:
    figures = {"secure_gap": 3e-10, "secure_gap_most": 2e-9, "secure_cut": 0.0}
    records = [replace(r, exactness_gap=None, held_gap=None, extras=figures if r.round else {}) for r in make_records()]
    folder = make_run(records=records)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["federation"] |= {"secure_sum": True, "secure_dropout": 0.3}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    text = report_text(read_run(folder))
    assert "of 10 clients 7 had to stay" in text
    assert "from one that tells clients different things, as long as fewer than 4 do" in text
    assert "fewer than 7 clients hand it what they hold" in text
    assert "is at most 2.0e-09 in any round, and expected to be 3.0e-10" in text
    assert "No value was beyond the bound" in text
    cut = [replace(r, extras={**figures, "secure_cut": 3.0}) for r in records[1:]]
    assert "9 values beyond the bound of a round's change (`federation.secure_bound`) were cut" in report_text(
        read_run(make_run("cut", records=cut))
    )
