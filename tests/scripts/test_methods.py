"""The comparison of methods: everyone gets as much, at the same budget, by the same grid, and a cell holds what its run does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.report.series import totals
from fedsb.run.folder import read_run
from fedsb.run.predictions import read_predictions
from scripts.bench.suite.cells import Job, cell_of, fill, final, unpack
from scripts.bench.suite.contestants import BYTES, CONTESTANTS, FULL_RATES, RATES, SHARED, TUNING_SEEDS, VALUES, Contestant
from scripts.bench.suite.plan import Cache, chosen, job_of, jobs_of
from scripts.bench.suite.ranks import rank_at, spent
from scripts.bench.suite.texts import VALIDATION, documented, write
from tests.strategies.federations import classification


@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_contestant_composes_and_gets_as_much(name: str) -> None:
    contestant = CONTESTANTS[name]
    for budget in contestant.budgets:
        config = load([*contestant.overrides, *contestant.at.get(budget, ()), *SHARED, "federation.num_clients=10", "data.path=x.jsonl"])
        f = config.federation
        seen = config.train.local_steps * config.train.batch_size * round(f.fraction * f.num_clients)
        assert (f.num_rounds, seen) == ((8, 5 * 4 * 8) if contestant.rates else (0, seen))
    assert contestant.rates in (RATES, FULL_RATES, ())
    assert len(contestant.rates) in (0, len(RATES))


def test_the_rank_is_the_one_that_comes_nearest_to_the_references_budget(tiny_bert: Path, tiny_csv: Path) -> None:
    shared = [text for text in classification(tiny_bert, tiny_csv) if not text.startswith("rank=")]
    for budget, contestant in ((VALUES, Contestant(("method=fed_sb",))), (BYTES, Contestant(("method=ffa_lora",)))):
        wanted = spent(budget, ["method=fedavg_lora", *shared, "rank=4"])
        found = rank_at(budget, contestant, shared)
        near = {rank: abs(spent(budget, [*contestant.overrides, *shared, f"rank={rank}"]) - wanted) for rank in range(found - 1, found + 2)}
        assert near[found] == min(near.values())
    with pytest.raises(UserError):
        spent(VALUES, ["method=fed_sb", *shared, "rank=33"])  # what the search looks beyond
    assert rank_at(VALUES, Contestant(("method=head_only",), sized=False), shared) is None


def test_the_rate_is_that_of_the_least_loss_where_it_was_validated(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "kept.json")
    cache.ranks["bbc/values/fed_sb"] = 68
    (tmp_path / "data").mkdir()
    for part in ("bbc.jsonl", "bbc_validation.jsonl"):
        (tmp_path / "data" / part).touch()
    tuning = list(jobs_of(cache, tmp_path, "bbc", VALUES, "fed_sb", None))
    assert [job.key for job in tuning] == [f"bbc/values/fed_sb/rate {rate:g}/seed {seed}" for seed in TUNING_SEEDS for rate in RATES]
    assert all({"rank=68", f"data.test_path={tmp_path}/data/bbc_validation.jsonl"} <= {*job.overrides} for job in tuning)
    losses = (0.9, 0.5, 0.4, float("inf"), 0.9, 0.5, 0.7, 0.1)  # the third rate is the best for one seed, and the fourth for the other
    for job, loss in zip(tuning, losses, strict=True):
        cache.note(job, {"rounds": [[8, 0, 0, 0, 0.5, loss]]} if loss < 1 else {"failed": "it diverged"})
    assert chosen(cache.cells, "bbc/values/fed_sb", RATES) == RATES[1]
    assert not list(jobs_of(cache, tmp_path, "bbc", VALUES, "fed_sb", None))
    cache.note(job_of("bbc/values/fed_sb/seed 3", ("method=fed_sb", "train.lr=0.5"), tmp_path), {"rounds": [[8, 0, 0, 0, 0.5, 0.1]]})
    (final,) = jobs_of(cache, tmp_path, "bbc", VALUES, "fed_sb", 3)  # what is kept of that seed asked for something else
    assert {"seed=3", f"train.lr={RATES[1]}"} <= {*final.overrides}
    assert not any("validation" in text for text in final.overrides)
    cache.keep()
    assert (Cache(tmp_path / "kept.json").cells, Cache(tmp_path / "kept.json").ranks) == (cache.cells, cache.ranks)


def test_what_two_budgets_ask_alike_is_run_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "kept.json")
    cache.ranks |= {"bbc/values/ffa_lora": 8, "bbc/bytes/ffa_lora": 8, "docstrings/values/ffa_lora": 8}
    (tmp_path / "data").mkdir()
    for part in ("bbc", "bbc_validation", "docstrings", "docstrings_validation"):
        (tmp_path / "data" / f"{part}.jsonl").touch()
    for job in jobs_of(cache, tmp_path, "bbc", VALUES, "ffa_lora", None):
        cache.note(job, {"rounds": [[8, 0, 0, 0, 0.5, 1.0]]})
    assert not list(jobs_of(cache, tmp_path, "bbc", BYTES, "ffa_lora", None))
    assert cache.cells["bbc/bytes/ffa_lora/rate 0.002/seed 101"] == cache.cells["bbc/values/ffa_lora/rate 0.002/seed 101"]
    assert len(list(jobs_of(cache, tmp_path, "docstrings", VALUES, "ffa_lora", None))) == len(RATES) * len(TUNING_SEEDS)
    assert Cache(tmp_path / "kept.json").cells == cache.cells
    assert not list(jobs_of(cache, tmp_path, "bbc", VALUES, "ffa_lora", None))
    cache.ranks["bbc/bytes/ffa_lora"] = 9
    cache.cells = {key: cell for key, cell in cache.cells.items() if "/values/" in key}
    assert len(list(jobs_of(cache, tmp_path, "bbc", BYTES, "ffa_lora", None))) == len(RATES) * len(TUNING_SEEDS)


def test_a_docstring_is_labelled_by_what_it_documents(tmp_path: Path) -> None:
    said = '"""Return the sum of all that is given."""'
    lines = ["class A:", '    """An A is what comes before any B."""', "    def b(self):", f"        {said}"]
    lines += ["def c():", '    """Too short."""', "def d():", f"    {said}"]
    (tmp_path / "code.py").write_text("\n".join(lines))
    rows = [(row["label"], row["text"][:6], row["owner"]) for row in documented(tmp_path / "code.py", "me")]
    assert sorted(rows) == [("class", "An A i", "me"), ("function", "Return", "me"), ("method", "Return", "me")]
    (tmp_path / "later.py").write_text("def f[T](x: T): ...\n")
    assert not list(documented(tmp_path / "later.py", "me"))


def test_what_rates_are_chosen_on_no_run_of_the_comparison_sees(tmp_path: Path) -> None:
    rest, validation = (path.read_text().splitlines() for path in write("bbc", tmp_path))
    assert len(validation) == VALIDATION
    assert len(rest) + VALIDATION == 2225


def test_a_cell_is_run_once_and_holds_what_its_run_does(tmp_path: Path, tiny_bert: Path, tiny_csv: Path) -> None:
    asked = [*classification(tiny_bert, tiny_csv), "method=fedavg_lora", "federation.num_rounds=2", "eval.every=1", "progress=lines"]
    job = Job("x/seed 0", tuple(asked), tmp_path / "x" / "seed-0")
    key, cell = fill(job)
    assert key == "x/seed 0"
    run, kept = read_run(job.folder), read_predictions(job.folder)
    assert kept is not None
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(cell["right"]), np.uint8))[: cell["tested"]]
    assert bits.mean() == pytest.approx(run.records[-1].metrics["accuracy"])
    unpack(cell, "a contestant", tmp_path / "again")
    again, kept_again = read_run(tmp_path / "again"), read_predictions(tmp_path / "again")
    assert (again.method, again.setting("seed"), again.setting("train.lr")) == ("a contestant", 0, run.setting("train.lr"))
    assert totals(again.records)["payload_total"] == run.summary["payload_total"]
    assert [r.round for r in again.records] == [0, 1, 2]
    for metric in ("accuracy", "loss"):
        values = [r.metrics[metric] for r in run.records]
        assert [r.metrics[metric] for r in again.records] == pytest.approx(values, abs=1e-6)
        assert final(cell, metric) == pytest.approx(values[-1], abs=1e-6)
    assert kept_again.items == kept.items
    assert np.array_equal(kept_again.measured("accuracy")[0], kept.measured("accuracy")[0])
    written = (job.folder / "metrics.jsonl").stat().st_mtime_ns
    assert fill(job) == (key, cell_of(run))
    assert (job.folder / "metrics.jsonl").stat().st_mtime_ns == written
    assert not (job.folder / "checkpoints").exists()


def test_a_mistake_in_the_plan_stops_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^unknown key"):
        fill(Job("x", ("no.such.key=1",), tmp_path / "x"))
