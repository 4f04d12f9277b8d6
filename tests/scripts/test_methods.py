"""The comparison of methods: everyone gets as much, at the same budget, by the same grid, and a cell holds what its run does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsb.adapters.layer import scale_of
from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.report.series import totals
from fedsb.run.folder import read_run
from fedsb.run.predictions import read_predictions
from scripts.bench.suite.cells import TRUTHS, Job, asks, cell_of, digest, fill, final, unpack
from scripts.bench.suite.contestants import (
    BYTES,
    CONTESTANTS,
    DATA,
    FULL_RATES,
    OWN_SCALE,
    RATES,
    REFERENCE_RANK,
    SCALE,
    SHARED,
    TUNING_SEEDS,
    VALUES,
    Contestant,
)  # fmt: skip
from scripts.bench.suite.plan import Cache, best_rates, chosen, first_rates, job_of, jobs_of, rate_key
from scripts.bench.suite.ranks import rank_at, spent
from scripts.bench.suite.texts import VALIDATION, documented, write
from tests.strategies.federations import classification


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_contestant_composes_and_gets_as_much(name: str, data: str) -> None:
    contestant = CONTESTANTS[name]
    for budget in contestant.budgets:
        config = load([*contestant.overrides, *contestant.at.get(budget, ()), *SHARED, *DATA[data], "data.path=x.jsonl"])
        f = config.federation
        seen = config.train.local_steps * config.train.batch_size * round(f.fraction * f.num_clients)
        assert (f.num_rounds, seen) == ((8, 5 * 4 * 8) if contestant.rates or contestant.rate_of else (0, seen))
        assert config.data.client_test_fraction == 0.2
    assert contestant.rates in (RATES, FULL_RATES, ())
    assert len(contestant.rates) in (0, len(RATES))


@pytest.mark.parametrize("rank", [3, 8, 20])
def test_all_of_lora_has_one_scale_at_any_rank(rank: int) -> None:
    for name, contestant in CONTESTANTS.items():
        if not contestant.sized or name in OWN_SCALE:
            continue
        adapter = load([*contestant.overrides, *SHARED, *DATA["bbc"], "data.path=x.jsonl", f"rank={rank}"]).adapter
        assert (scale_of(adapter.alpha, adapter.rank, rslora=adapter.rslora) if adapter.scale is None else adapter.scale) == SCALE, name


def test_the_rank_is_the_one_that_comes_nearest_to_the_references_budget(tiny_bert: Path, tiny_csv: Path) -> None:
    shared = [text for text in classification(tiny_bert, tiny_csv) if not text.startswith("rank=")]
    for budget, contestant in ((VALUES, Contestant(("method=fed_sb",))), (BYTES, Contestant(("method=ffa_lora",)))):
        wanted = spent(budget, ["method=fedavg_lora", *shared, f"rank={REFERENCE_RANK}"])
        at = rank_at(budget, contestant, shared)
        found = at.rank
        assert found is not None
        assert at.off == pytest.approx(spent(budget, [*contestant.overrides, *shared, f"rank={found}"]) / wanted - 1)
        near = {rank: abs(spent(budget, [*contestant.overrides, *shared, f"rank={rank}"]) - wanted) for rank in range(found - 1, found + 2)}
        assert near[found] == min(near.values())
    with pytest.raises(UserError):
        spent(VALUES, ["method=fed_sb", *shared, "rank=33"])  # what the search looks beyond
    assert rank_at(VALUES, Contestant(("method=head_only",), sized=False), shared).rank is None


def kept(tmp_path: Path, **ranks: int) -> Cache:
    """Return an empty cache with some ranks, and data sets of which each holds something else."""
    cache = Cache(tmp_path / "kept.json")
    cache.ranks |= {key.replace("__", "/"): {"rank": rank, "off": 0.0} for key, rank in ranks.items()}
    (tmp_path / "data").mkdir()
    for part in ("bbc", "bbc_validation", "docstrings", "docstrings_validation"):
        (tmp_path / "data" / f"{part}.jsonl").write_text(part)
    return cache


def with_loss(loss: float) -> dict[str, Any]:
    """Return the cell of a run that ended with a loss; an infinite one has failed."""
    return {"rounds": [[8, 0, 0, 0, 0.5, loss]]} if math.isfinite(loss) else {"failed": "it diverged"}


def test_the_two_best_rates_of_one_seed_run_with_another_and_the_least_mean_is_chosen(tmp_path: Path) -> None:
    cache, (first, second) = kept(tmp_path, bbc__values__fed_sb=68), TUNING_SEEDS
    tuning = list(jobs_of(cache, tmp_path, "bbc", VALUES, "fed_sb", first_rates))
    assert [job.key for job in tuning] == [rate_key("bbc/values/fed_sb", rate, first) for rate in RATES]
    assert all({"rank=68", f"data.test_path={tmp_path}/data/bbc_validation.jsonl"} <= {*job.overrides} for job in tuning)
    for job, loss in zip(tuning, (0.9, 0.5, 0.4, math.inf), strict=True):
        cache.note(job, with_loss(loss))
    finals = list(jobs_of(cache, tmp_path, "bbc", VALUES, "fed_sb", best_rates))
    assert {job.key for job in finals} == {rate_key("bbc/values/fed_sb", rate, second) for rate in RATES[1:3]}
    for job, loss in zip(finals, (0.9, 0.5), strict=True):  # of the third rate, then of the second
        cache.note(job, with_loss(loss))
    assert chosen(cache.cells, "bbc/values/fed_sb", RATES) == RATES[1]
    assert not list(jobs_of(cache, tmp_path, "bbc", VALUES, "fed_sb", best_rates))
    cache.note(job_of("bbc/values/fed_sb/seed 3", ("method=fed_sb", "train.lr=0.5"), tmp_path), with_loss(0.1))
    (final,) = jobs_of(cache, tmp_path, "bbc", VALUES, "fed_sb", 3)  # what is kept of that seed asked for something else
    assert {"seed=3", f"train.lr={RATES[1]}"} <= {*final.overrides}
    assert not any("validation" in text for text in final.overrides)
    cache.keep()
    held = {key: cell for key, cell in cache.cells.items() if "failed" not in cell}  # what failed is run again by the next start
    assert (Cache(tmp_path / "kept.json").cells, Cache(tmp_path / "kept.json").ranks) == (held, cache.ranks)
    assert len(held) == len(cache.cells) - 1
    assert chosen(held, "bbc/values/fed_sb", RATES) == RATES[1]


def test_whom_its_clients_measure_too_takes_the_rate_of_whom_it_is(tmp_path: Path) -> None:
    cache, name = kept(tmp_path, bbc__values__fedavg_lora=8, **{"bbc__values__fedavg_lora, at clients": 8}), "fedavg_lora, at clients"
    for stage in (first_rates, best_rates):
        assert not list(jobs_of(cache, tmp_path, "bbc", VALUES, name, stage))
        for job in jobs_of(cache, tmp_path, "bbc", VALUES, "fedavg_lora", stage):
            cache.note(job, with_loss(0.1 if "train.lr=0.008" in job.overrides else 0.2))
    (own,), (whose,) = (list(jobs_of(cache, tmp_path, "bbc", VALUES, each, 0)) for each in (name, "fedavg_lora"))
    assert "train.lr=0.008" in own.overrides
    assert {*own.overrides} - {*whose.overrides} == {"federation.evaluate_clients=true"}


def test_what_two_budgets_ask_alike_is_run_once(tmp_path: Path) -> None:
    cache = kept(tmp_path, bbc__values__ffa_lora=8, bbc__bytes__ffa_lora=8, docstrings__values__ffa_lora=8)
    for job in jobs_of(cache, tmp_path, "bbc", VALUES, "ffa_lora", first_rates):
        cache.note(job, with_loss(1.0))
    assert not list(jobs_of(cache, tmp_path, "bbc", BYTES, "ffa_lora", first_rates))
    assert cache.cells["bbc/bytes/ffa_lora/rate 0.002/seed 100"] == cache.cells["bbc/values/ffa_lora/rate 0.002/seed 100"]
    assert len(list(jobs_of(cache, tmp_path, "docstrings", VALUES, "ffa_lora", first_rates))) == len(RATES)
    assert Cache(tmp_path / "kept.json").cells == cache.cells
    assert not list(jobs_of(cache, tmp_path, "bbc", VALUES, "ffa_lora", first_rates))
    cache.ranks["bbc/bytes/ffa_lora"]["rank"] = 9
    cache.cells = {key: cell for key, cell in cache.cells.items() if "/values/" in key}
    assert len(list(jobs_of(cache, tmp_path, "bbc", BYTES, "ffa_lora", first_rates))) == len(RATES)


def test_a_run_of_other_data_is_another_run_wherever_the_data_lie(tmp_path: Path) -> None:
    found = []
    for folder, text in (("a", "one"), ("b", "one"), ("c", "another")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_text(text)
        found.append(asks(("method=fed_sb", f"data.path={tmp_path}/{folder}/rows.jsonl")))
    assert found[0] == found[1] != found[2]


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
    assert cell["made"]["data"] == {tiny_csv.name: digest(tiny_csv)}
    assert {"torch", "transformers", "fedsb"} <= {*cell["made"]["versions"]}
    unpack(cell, "a contestant", tmp_path / "again", cell[TRUTHS])
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
    assert np.array_equal(kept_again.columns["truth"], kept.columns["truth"])
    for here, there in zip(again.records, run.records, strict=True):
        assert (here.exactness_gap or 0.0) == pytest.approx(there.exactness_gap or 0.0, rel=1e-3)
    assert again.records[-1].extras == pytest.approx(run.records[-1].extras, rel=1e-5)
    written = (job.folder / "metrics.jsonl").stat().st_mtime_ns
    again_made = cell_of(run)
    assert fill(job) == (key, {**again_made, "made": cell["made"]})
    assert (job.folder / "metrics.jsonl").stat().st_mtime_ns == written
    assert not (job.folder / "checkpoints").exists()


def test_a_mistake_in_the_plan_stops_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^unknown key"):
        fill(Job("x", ("no.such.key=1",), tmp_path / "x"))
