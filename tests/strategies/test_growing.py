"""Runs whose frozen weights grow, by each rule: the same mathematics in float32, and the true gap beside a base in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from shlex import join

import pytest
import torch
from torch import Tensor

from fedsb.adapters.frozen_part import FACTORS
from fedsb.config.compose import load
from fedsb.core.state import squared_norm, subtract
from fedsb.models.adapted import AdaptedModel
from fedsb.models.build import build_model
from fedsb.run.checkpoint import load_checkpoint
from fedsb.runtime.grids import grid_for
from fedsb.server_app import serve
from fedsb.tasks.task import TASKS
from fedsb.wire.frozen import FrozenView
from fedsb.wire.frozen_cache import FrozenCache
from tests.strategies.federations import Federation, classification, federate, language_model
from tests.strategies.private_runs import EXAMPLE
from tests.strategies.rounds import GROWING

ROUNDS = ["federation.num_rounds=3", "train.lr=0.01", "federation.fraction=0.6", "eval.every=1"]
Run = Callable[[str, str, str], Federation]


@pytest.fixture(scope="module")
def run(tiny_llama: Path, tiny_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a federation of a method, a base's dtype and a rule, once a module."""

    @cache
    def made(method: str, dtype: str, hold: str) -> Federation:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FEDSB_HOME", str(tmp_path_factory.mktemp("home")))
            more = [f"method={method}", f"model.dtype={dtype}", f"frozen.hold={hold}"]
            return federate([*language_model(tiny_llama, tiny_csv), *ROUNDS, *more])

    return made


def fresh(federation: Federation) -> AdaptedModel:
    c = federation.config
    task = TASKS["causal_lm"]
    return build_model(c.model, c.adapter, family=c.method.adapter, task=task, labels=(), seed=c.seed, hold=c.frozen.hold)


def logits(adapted: AdaptedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = adapted.model(input_ids=torch.arange(12).view(2, 6)).logits
    return found.double()


@pytest.mark.parametrize("method", GROWING)
def test_in_float32_every_rule_is_the_same_run(run: Run, method: str) -> None:
    runs = {hold: run(method, "float32", hold) for hold in ("auto", "merge", "factors", "dense")}
    assert runs["auto"].sha256 == runs["factors"].sha256
    start = runs["auto"].kept.states[0]
    for other in ("merge", "dense"):
        states = [runs[hold].kept.states[-1] for hold in ("auto", other)]
        assert squared_norm(subtract(*states)) <= 1e-8 * max(squared_norm(subtract(states[0], start)) if states[0] else 1.0, 1e-3)
        for a, b in zip(runs["auto"].records, runs[other].records, strict=True):
            assert a.metrics == pytest.approx(b.metrics, rel=1e-4)
            assert (a.payload_up, a.payload_down, a.payload_one_off) == (b.payload_up, b.payload_down, b.payload_one_off)
    for hold in ("auto", "dense"):
        if runs[hold].prepared.strategy.is_exact:
            assert max(record.held_gap or 0.0 for record in runs[hold].records) < 1e-5


@pytest.mark.parametrize("method", GROWING)
def test_beside_a_narrow_base_the_method_stays_exact_and_a_merge_shows_its_gap(run: Run, method: str) -> None:
    beside, merged = run(method, "bfloat16", "auto"), run(method, "bfloat16", "merge")
    assert set(beside.prepared.adapted.held_as_factors) == set(beside.prepared.adapted.layers)
    for record in beside.records[1:]:
        assert record.held_gap == pytest.approx(record.exactness_gap, abs=1e-5)
    exact = beside.prepared.strategy.is_exact
    assert max((record.held_gap or 0.0) - (record.exactness_gap or 0.0) for record in merged.records) > (1e-3 if exact else 1e-4)
    if exact:
        assert max(record.exactness_gap or 0.0 for federation in (beside, merged) for record in federation.records) < 1e-5


@pytest.mark.parametrize(("method", "dtype"), [("fedex_lora", "float32"), ("fedex_lora", "bfloat16"), ("abba_masked", "bfloat16")])
def test_whoever_comes_when_computes_the_same(run: Run, method: str, dtype: str, tmp_path: Path) -> None:
    """A client that was there in each round, and one that comes at the end, held as factors that have become too heavy by then."""
    federation = run(method, dtype, "factors")
    log, state, found = federation.frozen, federation.kept.states[-1], []
    assert any(residual.dense is not None for residual in log.view().residuals.values())
    views: dict[str, Callable[[], FrozenView]] = {
        "from the start": partial(followed, federation, tmp_path / "start"),
        "late": partial(loaded, federation, tmp_path / "late", 0),
        "the server": log.view,
    }
    for view in views.values():
        adapted = fresh(federation)
        adapted.install(state, view())
        assert {layer.frozen.rule for layer in adapted.layers.values()} == {FACTORS}
        found.append(logits(adapted))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def loaded(federation: Federation, folder: Path, since: int) -> FrozenView:
    store, log = FrozenCache(folder, as_factors=True), federation.frozen
    if bundle := log.bundle(since):
        store.receive(bundle)
    return store.load(log.head)


def followed(federation: Federation, folder: Path) -> FrozenView:
    """Return what a holder has who takes each version by itself and computes with it."""
    store, log = FrozenCache(folder, as_factors=True), federation.frozen
    view = FrozenView()
    for exchanges in federation.grid.rounds().values():
        bundle = exchanges[0].instruction.bundle
        if bundle is not None:
            store.receive(bundle)
            view = store.load(bundle.head)
            for residual in view.residuals.values():
                residual.settle()
    last = log.bundle(log.version - 1)
    assert last is not None
    store.receive(last)
    return store.load(log.head)


@pytest.mark.parametrize("more", [[], EXAMPLE], ids=["plain", "private"])
def test_clients_side_by_side_compute_with_what_stands_beside(
    more: Sequence[str], tiny_bert: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    states = []
    for size in (1, 3):
        own = ["method=fedex_lora", "frozen.hold=factors", "train.lr=0.02", "federation.num_rounds=2", f"runtime.stack={size}"]
        overrides = [*classification(tiny_bert, tiny_csv), *own, *more]
        config = load(overrides)
        serve(config, grid_for(config, {"overrides": join(overrides), "output": str(tmp_path / str(size))}), tmp_path / str(size))
        states.append(load_checkpoint(tmp_path / str(size) / "checkpoints").state)
    alone, stacked = states
    assert squared_norm(subtract(stacked, alone)) < 1e-10 * squared_norm(alone)
