"""The round that a run leaves is the best on the validation part, to the bits of a run that ends there, cut off or not."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsb.app.finished import left_of
from fedsb.app.measuring.scoring import figures
from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.report.card import card_text
from fedsb.report.selection import Selection
from fedsb.report.table import metric_text, selected_text
from fedsb.run.folder import read_run
from fedsb.run.predictions import read_predictions
from fedsb.run.records import RoundRecord
from fedsb.sweep.watching import Watch, cells
from tests.conftest import TOPICS
from tests.run.mortal import Killed, Run

# Rates so high that an early round is the best.
CHOOSING = ("method=fedex_lora", "data.validation_fraction=0.2", "eval.select=loss", "train.lr=0.2", "keep_checkpoints=1")


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def adapter(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "adapter").iterdir())}


@pytest.fixture
def whole(run: Run, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A run that ends early, and its summary."""
    return tmp_path / "whole", run(tmp_path / "whole", *CHOOSING, "federation.num_rounds=4", "eval.patience=2")


def test_the_adapter_is_that_of_the_best_round_and_cut_or_not_the_same(
    whole: tuple[Path, dict[str, Any]], run: Run, tmp_path: Path
) -> None:
    folder, summary = whole
    losses = [row["validation"]["loss"] for row in rows(folder)]
    best = losses.index(min(losses))
    assert summary["selected"] == {
        "round": best, "metric": "loss", "direction": "lower", "value": losses[best], "stopped": len(losses) < 5,
    }  # fmt: skip
    assert len(losses) == min(5, best + 3)
    assert 0 < best < len(losses) - 1  # or nothing is tried here
    assert summary["metrics"] == rows(folder)[best]["metrics"] != rows(folder)[best]["validation"]
    assert summary["rounds_done"] == len(losses) - 1
    assert f"of round {best}, the best by loss on the validation part" in (folder / "run.log").read_text()
    assert (
        f"after round {len(losses) - 1}, of round {best}: loss {rows(folder)[best]['metrics']['loss']:.3f}"
        in (folder / "run.log").read_text()
    )
    assert left_of(folder, "export").snapshot.round == best
    value = metric_text("loss", summary["metrics"]["loss"])
    assert f"They are of {selected_text(summary['selected'])}, as is the model." in (folder / "report.md").read_text()
    card = card_text(read_run(folder), base="b", hub_id=None, licence=None, library="peft", how="", remarks=())
    assert re.search(rf"after round {best} \|.*\n.*\n\| loss \| .* \| {value} \|", card), card
    assert f"| of these | {selected_text(summary['selected'])} |" in card
    value = metric_text("loss", losses[best])
    assert adapter(folder)["README.md"].decode() == f"The adapter of round {best}, the best by loss on the validation part ({value}).\n"
    [seen] = Watch(folder).look()
    shown = cells(seen)[3]
    name = shown.split()[0]
    assert shown == f"{name} {metric_text(name, summary['metrics'][name])}"
    kept = read_predictions(folder)
    assert kept is not None
    assert kept.round == best

    short = run(tmp_path / "short", *CHOOSING, f"federation.num_rounds={best}")
    assert short["factors_sha256"] == summary["factors_sha256"]
    assert adapter(tmp_path / "short") == adapter(folder)

    cut = tmp_path / "cut"
    with pytest.raises(Killed):
        run(cut, *CHOOSING, "federation.num_rounds=4", "eval.patience=2", life=4 * (len(losses) - 1) - 2)
    again = run(cut, f"resume={cut}")
    told = ("selected", "metrics", "rounds_done", "factors_sha256", "payload_total")
    assert {key: again[key] for key in told} == {key: summary[key] for key in told}
    assert adapter(cut) == adapter(folder)


@pytest.mark.parametrize("method", ["fedsvd", "flora"])
def test_what_a_method_has_frozen_is_that_of_the_best_round_too(method: str, run: Run, tmp_path: Path) -> None:
    """Whichever round is chosen: one of a run that ends there, whose frozen log went on meanwhile."""
    given = (f"method={method}", "data.validation_fraction=0.2", "eval.select=loss", "keep_checkpoints=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsb.report.selection.Selection._value", lambda self, record: float(abs(record.round - 1)))
        summary = run(tmp_path / "run", *given, "federation.num_rounds=3")
        short = run(tmp_path / "short", *given, "federation.num_rounds=1")
    assert (summary["selected"]["round"], summary["rounds_done"]) == (1, 3)
    assert summary["factors_sha256"] == short["factors_sha256"]
    assert adapter(tmp_path / "run") == adapter(tmp_path / "short")


VALUES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, math.nan, math.inf, -math.inf, None]), min_size=1, max_size=9)


@given(VALUES, st.booleans(), st.integers(1, 4))
def test_the_best_is_the_first_of_the_best_and_patience_counts_what_was_measured(
    values: list[float | None], lower: bool, patience: int
) -> None:
    records = [RoundRecord(n, validation={} if value is None else {"m": value}) for n, value in enumerate(values)]
    best, since = None, 0
    for number, value in enumerate(values):
        if value is None:
            continue
        gain = math.isfinite(value) and (best is None or (value < values[best] if lower else value > values[best]))  # type: ignore[operator]
        best, since = (number, 0) if gain else (best, since + 1)
    choice = Selection("m", lower, patience)
    found = choice.best(records)
    assert (None if found is None else found.round) == best
    assert choice.over(records) is (since >= patience)
    assert Selection("m", lower).over(records) is False
    # What a run that goes on reads back chooses as what the run itself has seen does.
    again = [RoundRecord.from_json(record.to_json()) for record in records]
    assert choice.told(again) == choice.told(records)
    assert choice.over(again) is choice.over(records)


def test_what_is_better_is_known_of_a_metric_or_said() -> None:
    assert [Selection.of(name, "auto", None).lower for name in ("loss", "accuracy", "rmse")] == [True, False, True]  # type: ignore[union-attr]
    assert Selection.of("loss", "higher", 3) == Selection("loss", False, 3)
    assert Selection.of(None, "auto", None) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["eval.select=accuracy"], "eval.select=accuracy without a validation part, and the test part chooses nothing"),
        (["data.validation_fraction=0.1"], "data.validation_fraction without eval.select"),
        (["eval.patience=2"], "eval.patience without eval.select"),
        (["eval.direction=lower"], "eval.direction without eval.select"),
        (["eval.select=accuracy", "data.validation_fraction=0.1", "method=fedsa_lora"], "the server has no whole model to choose"),
        (["eval.select=accuracy", "data.validation_fraction=1"], r"data.validation_fraction=1.0 is out of range; it must be in \[0, 1\)"),
        (["eval.select=accuracy", "data.validation_fraction=0.1", "eval.patience=0"], "eval.patience=0 is out of range"),
        (["eval.select=accuracy", "data.validation_fraction=0.1", "eval.direction=up"], "unknown eval.direction 'up'"),
    ],
)  # fmt: skip
def test_a_choice_that_cannot_be_made_is_one_line(given: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(given)


def test_a_metric_that_is_not_measured_is_a_mistake_before_anything_is_written(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^unknown eval.select 'accurac' \(did you mean 'accuracy'\?\); choose from accuracy, loss, "):
        run(tmp_path / "none", "data.validation_fraction=0.2", "eval.select=accurac")
    assert not (tmp_path / "none").exists()


def test_where_no_round_can_be_chosen_the_last_one_is_left_and_that_is_said(run: Run, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsb.server_app.figures", lambda found: {**figures(found), "loss": math.inf})
        summary = run(tmp_path / "run", *CHOOSING, "federation.num_rounds=3", "eval.patience=2")
    log, kept = (tmp_path / "run" / "run.log").read_text(), read_predictions(tmp_path / "run")
    assert (summary["selected"], summary["rounds_done"]) == (None, 1)
    assert "the model that is left is the last: no round has a finite loss on the validation part" in log
    assert "no gain on the validation part in any round (eval.patience): no more rounds" in log
    assert kept is not None
    assert kept.round == 1


def test_a_validation_file_that_is_the_test_part_chooses_nothing(run: Run, tmp_path: Path) -> None:
    same = ("method=fedavg_lora", f"data.validation_path='{tmp_path / 'test.csv'}'", "eval.select=loss")
    with pytest.raises(UserError, match=r"^data.validation_path=.*test.csv: every text of it is one of the test part, and that chooses "):
        run(tmp_path / "same", *same)
    assert not (tmp_path / "same").exists()
    lines = (tmp_path / "test.csv").read_text().splitlines()
    (tmp_path / "some.csv").write_text("\n".join([*lines[:5], "a new text,film", ""]))
    run(tmp_path / "some", *same[::2], f"data.validation_path='{tmp_path / 'some.csv'}'", "federation.num_rounds=1")
    assert "4 of 5 validation rows have texts of the test part" in (tmp_path / "some" / "run.log").read_text()


def test_the_test_part_has_no_say(run: Run, tmp_path: Path) -> None:
    """Its labels are turned, so that it and the validation part wish for opposite rounds."""
    labels = sorted(TOPICS)
    rows_told = [(" ".join(TOPICS[labels[i % 3]][: 2 + i % 5]), labels[(i + 1) % 3]) for i in range(12)]
    (tmp_path / "test.csv").write_text("\n".join(["text,label", *(f"{text},{label}" for text, label in rows_told)]) + "\n")
    given = ("method=fedavg_lora", "train.lr=0.02", "data.validation_fraction=0.2", "eval.select=loss", "federation.num_rounds=2")
    summary = run(tmp_path / "run", *given)
    told = rows(tmp_path / "run")
    by = {part: min(range(3), key=lambda number: told[number][part]["loss"]) for part in ("metrics", "validation")}
    assert summary["selected"]["round"] == by["validation"] != by["metrics"]


def test_rounds_that_are_not_run_cost_no_epsilon(run: Run, tmp_path: Path) -> None:
    private = ("privacy=example", "privacy.epsilon=50", "init.kind=weight_svd", *CHOOSING[1:], "federation.num_rounds=4", "eval.patience=1")
    summary = run(tmp_path / "run", *private)
    assert summary["selected"]["stopped"] is True
    assert len(rows(tmp_path / "run")) == summary["rounds_done"] + 1 < 5
    assert summary["epsilon"]["max"] == rows(tmp_path / "run")[-1]["epsilon"]["max"] < 40
