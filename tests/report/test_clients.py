"""What is said of the clients: spread and worst by the metric's own direction, from the last round that has any."""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsb.report.clients import client_spread
from fedsb.report.report import report_text
from fedsb.report.table import rows
from fedsb.run.folder import read_run
from fedsb.run.records import RoundRecord
from tests.report.made import Maker, make_records, make_summary
from tests.report.test_report import table_after

SCORES = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.floats(0, 1), min_size=2, max_size=8)


@given(SCORES)
def test_the_worst_is_the_lowest_score_and_the_highest_loss(scores):
    records = [RoundRecord(1, client_metrics={client: {"accuracy": v, "loss": v} for client, v in scores.items()}), RoundRecord(2)]
    spread = client_spread(records)
    assert spread["accuracy"]["worst"] == min(scores.values())
    assert spread["loss"]["worst"] == max(scores.values())
    for row in spread.values():
        assert scores[row["worst_client"]] == row["worst"]
        assert row["mean"] == statistics.mean(scores.values()) or abs(row["mean"] - statistics.mean(scores.values())) < 1e-12
        assert abs(row["std"] - statistics.stdev(scores.values())) < 1e-12
        assert row["clients"] == len(scores)


@pytest.mark.parametrize(("clients", "tenth"), [(1, 1), (10, 1), (11, 2), (20, 2), (27, 3)])
def test_the_worst_tenth_is_the_mean_of_a_tenth_of_the_clients_rounded_up(clients: int, tenth: int) -> None:
    values = random.Random(clients).sample(range(100), clients)
    metrics = {f"client-{i}": {"accuracy": v / 100, "loss": v / 100} for i, v in enumerate(values)}
    spread = client_spread([RoundRecord(1, client_metrics=metrics)])
    assert spread["accuracy"]["worst_tenth"] == pytest.approx(sum(sorted(values)[:tenth]) / tenth / 100)
    assert spread["loss"]["worst_tenth"] == pytest.approx(sum(sorted(values)[-tenth:]) / tenth / 100)


def test_a_run_without_metrics_on_clients_has_no_spread(make_run: Maker):
    assert client_spread(make_records()) == {}
    assert "evaluate_clients=true" in report_text(read_run(make_run())).split("## Clients\n")[1].split("\n## ")[0]


def test_report_and_table_show_who_holds_what_and_fares_worst(make_run: Maker):
    metrics = {"a": {"accuracy": 0.9}, "b": {"accuracy": 0.5}}
    records = [*make_records(rounds=2), replace(make_records()[-1], client_metrics=metrics, held_out={"a": 3, "b": 1})]
    folder = make_run(records=records)
    partition = {
        "label_skew": 0.25,
        "labels": ["no", "yes"],
        "sizes": {"a": 30, "b": 10},
        "label_shares": {"a": [0.5, 0.5], "b": [1.0, 0.0]},
    }
    summary = {**make_summary(records), "partition": partition}
    (folder / "summary.json").write_text(json.dumps(summary))
    text = report_text(read_run(folder)).split("## Clients\n")[1].split("\n## ")[0]
    assert "2 clients hold 40 examples, 10 to 30 each; label skew **0.25**" in text
    assert "| accuracy | 0.700 | 0.800 | 0.283 | 0.500 | 0.500 (b) |" in text
    assert "| client | examples | no | yes | held out | accuracy |" in text
    assert "| b | 10 | 100% | 0% | 1 | 0.500 |" in text
    assert dict(rows(summary))["on clients"] == "accuracy 0.700 ± 0.283, worst 0.500 (b)"
    assert table_after("Clients", report_text(read_run(folder)))[1][0] == "accuracy"
