"""Methods held against each other: what may be paired, what it takes to reach one quality, whose budgets are equal, what is doubtful."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedsb.core.errors import UserError
from fedsb.report.comparing import comparisons
from fedsb.report.comparison import MOST, comparison_text, write_comparison
from fedsb.report.folders import write_reports
from fedsb.report.groups import Group, grouped, reference_of
from fedsb.report.methods import Asked
from fedsb.report.sanity import Table, remarks
from fedsb.report.until import reach, usual_target
from fedsb.run.folder import read_run
from fedsb.run.records import SHARED, RoundRecord
from tests.report.made import Maker, keep_predictions, make_records
from tests.report.test_report import table_after

SEEDS = (0, 1, 2)
Sweep = Callable[..., list[Path]]


def hits(count: int, of: int = 40) -> list[int]:
    """Return ``count`` right answers among ``of``, the first ones."""
    return [1] * count + [0] * (of - count)


def measured(records: Sequence[RoundRecord], final: Mapping[str, float]) -> list[RoundRecord]:
    return [*records[:-1], replace(records[-1], metrics={**records[-1].metrics, **final})]


@pytest.fixture
def sweep(make_run: Maker) -> Sweep:
    """Return a function that makes the runs of a method, one a seed, with so many right answers of 40."""

    def make(
        method: str, right: int, seeds: Sequence[int] = SEEDS, *, items: str = "test", like: str = "fed_sb", **given: object
    ) -> list[Path]:
        folders = []
        for seed in seeds:
            records = measured(make_records(like), {"accuracy": right / 40})
            folder = make_run(f"{method}-{given.get('rank', 16)}-{seed}", method, seed=seed, records=records, **given)
            keep_predictions(folder, hits(right), f"{items} {seed}")
            folders.append(folder)
        return folders

    return make


def groups_of(*folders: Path) -> list[Group]:
    return grouped([read_run(folder) for folder in folders])


def remarks_on(*folders: Path, metric: str = "accuracy", tuned: str | None = None) -> str:
    return "\n".join(remarks(Table(groups_of(*folders), metric, tuned)))


def text_of(folders: Sequence[Path], **asked: Any) -> str:
    runs = [read_run(folder) for folder in folders]
    return comparison_text(runs, comparisons(runs, Asked(**asked)))


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_methods_are_held_against_the_reference_by_seed_and_item(sweep: Sweep, tmp_path: Path) -> None:
    folders = [*sweep("fedavg_lora", 20, like="fedavg_lora"), *sweep("fed_sb", 30), *sweep("ffa_lora", 20), *sweep("flora", 36, (0,))]
    path = write_comparison(folders, tmp_path / "out")
    _, *rows = table_after("Differences", path.read_text())
    shown = {row[0]: row[-1] for row in rows}
    assert shown["fedavg_lora"] == "(the reference)"
    assert shown["ffa_lora"] == "+0.000 [+0.000, +0.000]"
    assert shown["fed_sb"].startswith("**+0.250 [+0.1")
    assert shown["flora"].startswith("+0.400 [+0.")  # clear, and of one seed
    assert "Who knows nothing scores 0.500." in path.read_text()
    for name in ("differences.png", "quality_against_bytes.png", "comparison.png"):
        assert (path.parent / name).stat().st_size > 5000
        assert f"]({name})" in path.read_text()
    _, *turned = table_after("Differences", text_of(folders, against="fed_sb"))
    assert {row[0]: row[-1] for row in turned}["fedavg_lora"].startswith("**-0.250")


def test_runs_of_other_test_items_are_not_paired(sweep: Sweep) -> None:
    folders = [*sweep("fedavg_lora", 20), *sweep("fed_sb", 30, items="other"), *sweep("flora", 30)]
    text = text_of(folders)
    assert "| not paired: other test items with seed 0: give all runs the same data and eval.max_examples |" in text
    with pytest.raises(UserError, match=r"^--against fedavg_lora: nothing can be paired with it \(fed_sb: other test items with seed 0"):
        text_of(folders[:6], against="fedavg_lora")


def test_what_cannot_be_paired_says_why(sweep: Sweep, make_run: Maker) -> None:
    own = [replace(record, measured_by="clients") for record in make_records()]
    others = [make_run("own", "fedsa_lora", records=own), make_run("old", "ffa_lora", records=make_records()), *sweep("flora", 20, (7,))]
    text = text_of([*sweep("fedavg_lora", 20), *others])
    shown = {row[0]: row[-1] for row in table_after("Differences", text)[1:]}
    assert shown["fedsa_lora"] == "not paired: fedsa_lora is measured by its clients, each on its own part"
    assert shown["ffa_lora"] == "not paired: ffa_lora has kept no predictions that can be read: run it again"
    assert shown["flora"] == "not paired: no seed in common with fedavg_lora"
    assert [row[1] for row in table_after("Bytes to equal quality", text) if row[0] == "fedsa_lora"] == ["measured by its clients"]
    some = text_of([*sweep("hetlora", 20, (0, 1)), *sweep("florist", 20, (1, 2))])
    assert table_after("Differences", some)[2][-1] == "+0.000 [+0.000, +0.000] of 1 seed in common"
    by_f1 = text_of([*sweep("rolora", 20), *sweep("flexlora", 20)], metric="macro_f1")
    assert "not paired: macro_f1 is no mean over test items" in by_f1


def test_of_several_references_it_is_the_one_with_the_same_settings(sweep: Sweep) -> None:
    groups = groups_of(*(f for method in ("fedavg_lora", "flora") for rank in (4, 8) for f in sweep(method, 20, rank=rank)))
    assert [group.label for group in groups] == ["fedavg_lora rank 4", "fedavg_lora rank 8", "flora rank 4", "flora rank 8"]
    assert [reference_of(group, groups, None).label for group in groups] == [f"fedavg_lora rank {rank}" for rank in (4, 8, 4, 8)]
    assert {reference_of(group, groups, "flora rank 8").label for group in groups} == {"flora rank 8"}
    with pytest.raises(UserError, match=r"^--against rolora: no finished run is of it; choose from fedavg_lora rank 4, .*, flora rank 8$"):
        reference_of(groups[0], groups, "rolora")
    other = groups_of(*sweep("fed_sb", 20, rank=2))
    assert reference_of(other[0], [*groups, *other], None) is None


def test_bytes_to_equal_quality_count_the_one_off_and_say_never(sweep: Sweep) -> None:
    """Made runs score 0.806 after round 1 and 0.897 after round 2, and then what they are given."""
    sb, lora, low = sweep("fed_sb", 38), sweep("fedavg_lora", 36, like="fedavg_lora"), sweep("ffa_lora", 4)
    groups = groups_of(*sb, *lora, *low)
    assert usual_target(groups, "accuracy") == pytest.approx(0.1)
    found = [reach(group, "accuracy", 0.85) for group in groups[:2]]
    assert [each.point.round for each in found] == [2, 2]
    assert found[0].point.bytes == 4_423_680 + 2 * 2 * 92_160
    assert found[0].point.one_off == 4_423_680
    assert found[1].point.bytes == 2 * 2 * 2_211_840
    late = reach(groups[2], "accuracy", 0.92)
    assert (late.point, late.runs, late.of) == (None, 0, 3)
    lower = reach(groups[0], "loss", 0.4)
    assert (lower.point.round, lower.point.value) == (2, pytest.approx(0.4))
    rows = table_after("Bytes to equal quality", text_of([*sb, *low], target=0.92))[1:]
    assert rows == [["fed_sb", "3", "5.0 MB", "4.4 MB", "3 of 3"], ["ffa_lora", "never", "–", "–", "0 of 3"]]


def test_budgets_are_held_equal_in_three_ways(sweep: Sweep) -> None:
    same = [*sweep("fedavg_lora", 20), *sweep("flora", 20)]
    text = section(text_of(same), "Budgets")
    assert "the 2 federated methods are equal in rank, trained values and bytes." in text
    text = section(text_of([*same, *sweep("rolora", 20, rank=32)]), "Budgets")
    assert "are equal in trained values and bytes. They differ in rank (the largest is 2 times the smallest)." in text


def test_what_makes_a_table_doubtful_is_said(sweep: Sweep) -> None:
    base, weak, strong = sweep("untouched", 20), sweep("fedavg_lora", 21), sweep("fed_sb", 34)
    said = remarks_on(*base, *weak, *strong)
    assert "fedavg_lora equals the untouched base within noise (accuracy differs by [" in said
    assert "fed_sb equals" not in said
    assert "below the chance level" not in said
    assert "Rates: set by hand for untouched, fedavg_lora, fed_sb, else as shipped; none is known to be tuned" in said
    assert "One seed" not in said
    low = remarks_on(*base, *sweep("flora", 4))
    assert "flora: accuracy 0.100 is below the chance level 0.500: it has learnt less than to name the commonest class." in low
    assert "No untouched base is among these runs" in remarks_on(*weak)
    assert "Rates: tuned, of 4 by a grid." in remarks_on(*weak, tuned="of 4 by a grid")


def test_better_than_pooled_and_one_seed_alone_are_said(sweep: Sweep) -> None:
    pooled, strong, one = sweep("centralized", 20), sweep("fed_sb", 34), sweep("flora", 20, (0,))
    said = remarks_on(*pooled, *strong, *one)
    assert "fed_sb is better than pooled data by 0.350, more than 2 standard errors: check for leakage" in said
    assert "flora is better" not in said
    assert "One seed alone of flora: intervals are over test items" in said
    assert "One seed alone of every method" in remarks_on(*one)
    assert "better" not in remarks_on(*sweep("ffa_lora", 20), *pooled)


def test_answers_that_are_not_parsed_and_residuals_in_factors_are_said(make_run: Maker) -> None:
    lost = measured(make_records(), {"exact_match": 0.1, "chance": 0.3, "parse_failures": 0.9})
    said = remarks_on(make_run("a", "fed_sb", records=lost), make_run("b", "fedex_lora"), metric="exact_match")
    assert "fed_sb: exact_match 0.100 is below the chance level 0.300: answers may not be parsed (parse failures 0.900)." in said
    assert "fedex_lora: its residual travels, and is counted, as factors of rank up to 72; published tables count it as dense" in said


def test_of_many_differences_some_are_chance(sweep: Sweep) -> None:
    folders = [folder for i in range(11) for folder in sweep(f"method-{i}", 20, (0,))]
    assert "Of 10 intervals at 95% some 0.5 leave zero out by chance" in remarks_on(*folders)
    assert "by chance" not in remarks_on(*folders[:10])


def test_clients_are_compared_by_their_own_models_and_by_what_is_shared(make_run: Maker) -> None:
    own = {f"c{i}": {"accuracy": 0.8 - i / 100, f"{SHARED}accuracy": 0.2} for i in range(4)} | {"c4": {}}
    one = {f"c{i}": {"accuracy": 0.9 - i / 10} for i in range(4)}
    folders = [
        make_run(f"{method}-{seed}", method, seed=seed, records=[*make_records()[:-1], replace(make_records()[-1], client_metrics=rows)])
        for method, rows in (("fedsa_lora", own), ("fed_sb", one))
        for seed in (0, 1)
    ]
    text = section(text_of([*folders, make_run("none", "ffa_lora", records=make_records())]), "Clients")
    rows = table_after("Clients", f"## Clients\n\n{text}")[1:]
    assert rows[0] == ["fedsa_lora", "personal", "4", "0.785", f"{statistics.stdev([0.8, 0.79, 0.78, 0.77]):.3f}", "0.770"]
    assert rows[1][:4] == ["fedsa_lora", "shared", "4", "0.200"]
    assert rows[2][:4] == ["fed_sb", "the one model", "4", "0.750"]
    assert len(rows) == 3
    assert "*shared* is what one that has never trained would use" in text


def test_many_runs_are_shown_by_their_methods(sweep: Sweep, tmp_path: Path) -> None:
    seeds = range(MOST // 2 + 1)
    path = write_comparison([*sweep("fedavg_lora", 20, seeds), *sweep("fed_sb", 30, seeds)], tmp_path / "out")
    assert not (path.parent / "comparison.png").exists()
    assert table_after("Settings that differ", path.read_text())[0] == ["setting", "fedavg_lora", "fed_sb"]


def test_what_is_asked_of_a_comparison_needs_several_runs_and_their_metrics(sweep: Sweep) -> None:
    folders = sweep("fedavg_lora", 20, (0,))
    with pytest.raises(UserError, match=r"^--against, --metric, --target and --tuned are for several runs; give the folders of more$"):
        write_reports(folders, None, Asked(target=0.5))
    with pytest.raises(UserError, match=r"^--metric bleu: no run has it; choose from accuracy, macro_f1, loss$"):
        text_of([*folders, *sweep("fed_sb", 20, (0,))], metric="bleu")
    assert "## Differences" not in text_of([*folders, *sweep("fedavg_lora", 20, (1,))])


def test_a_report_that_a_run_has_written_is_not_written_again(sweep: Sweep, make_run: Maker) -> None:
    folders = [*sweep("fedavg_lora", 20, (0,)), make_run("cut", "fed_sb", finished=False)]
    for folder in folders:
        (folder / "report.md").write_text("mine")
    assert [path.parent for path in write_reports(folders)[:-2]] == [folders[1]]
    assert (folders[0] / "report.md").read_text() == "mine"
