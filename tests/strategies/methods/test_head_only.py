"""Laws of training the head alone: a frozen body, the mean of the heads, and nothing else on the wire."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from shlex import join
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from fedsb.adapters import SPECS
from fedsb.app.assembly import model_of
from fedsb.cli import main
from fedsb.client_app import app as client_app
from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.core.state import HEAD, Name, State, WeightedSum
from fedsb.cost.table import cost_of, costs
from fedsb.models.build import build_model
from fedsb.report.report import write_report
from fedsb.runtime.local import LocalGrid
from fedsb.server_app import serve
from fedsb.tasks.task import TASKS
from tests.strategies.federations import Federation, classification, federate, language_model

ROUNDS = ["method=head_only", "federation.num_rounds=3", "federation.fraction=0.6", "train.lr=0.02"]
MODELS = ("tiny_bert", "tiny_gpt2", "tiny_llama")
Plain = Callable[[str], Federation]


@pytest.fixture(scope="session")
def plain(request: pytest.FixtureRequest, tiny_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """Run three rounds with three of five clients of unequal size, once a model."""

    @cache
    def run(model: str) -> Federation:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FEDSB_HOME", str(tmp_path_factory.mktemp("home")))
            return federate([*classification(request.getfixturevalue(model), tiny_csv), *ROUNDS])

    return run


@pytest.mark.parametrize("model", MODELS)
def test_what_is_held_is_the_weighted_mean_of_the_uploaded_heads(plain: Plain, model: str) -> None:
    federation = plain(model)
    layout = federation.prepared.adapted.layouts.down
    rounds = federation.grid.rounds()
    assert {name.role for name, _ in layout.shapes} == {HEAD}
    before = federation.prepared.initial
    for number, exchanges in rounds.items():
        assert len({e.answer.num_examples for e in exchanges}) == len(exchanges) == 3
        total = WeightedSum()
        for e in exchanges:
            assert same(e.instruction.state(layout), before)
            total.add(e.answer.state(layout), e.answer.num_examples)
        held = federation.kept.states[number]
        for name, mean in total.mean().items():
            torch.testing.assert_close(held[name].double(), mean, rtol=1e-6, atol=1e-7)
        assert not same(held, before)
        assert federation.records[number].exactness_gap < 1e-6
        before = held
    assert len(rounds) == 3


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(torch.equal(t, right[name]) for name, t in left.items())


@pytest.mark.parametrize("model", MODELS)
def test_the_body_keeps_its_bits(plain: Plain, model: str) -> None:
    federation = plain(model)
    adapted, fresh = federation.prepared.adapted, dict(federation.fresh_model().model.named_parameters())
    parameters = dict(adapted.model.named_parameters())
    assert {name for name, p in parameters.items() if p.requires_grad} == set(adapted.head)
    assert set(parameters) == set(fresh)
    assert all(torch.equal(p, fresh[name]) for name, p in parameters.items() if name not in adapted.head)
    assert not adapted.layers
    assert federation.frozen.version == 0


@pytest.mark.parametrize("model", MODELS)
def test_bytes_are_the_heads_and_as_foretold(plain: Plain, model: str) -> None:
    federation = plain(model)
    numel = sum(t.numel() for t in federation.prepared.initial.values())
    assert numel == 3 * 32 + (3 if model == "tiny_bert" else 0)
    assert federation.payload() == (4 * numel * 3 * 3, 4 * numel * 3 * 3, 0)
    cost = cost_of(federation.config)
    assert (cost.payload_up, cost.payload_down, cost.payload_one_off) == federation.payload()
    assert (cost.rank, cost.trained, cost.bytes_up, cost.bytes_down, cost.one_off) == (None, numel, 4 * numel, 4 * numel, 0)


OTHER_WAYS = {
    "a coarse wire": ["federation.wire_dtype=bfloat16"],
    "clients that evaluate": ["federation.evaluate_clients=true", "data.client_test_fraction=0.3"],
    "momentum": ["federation.server_optimizer.name=momentum", "federation.server_optimizer.lr=0.5"],
    "a mean over the tokens": ["model.pooling=mean"],
}


@pytest.mark.parametrize("way", OTHER_WAYS)
def test_other_settings_go_through_and_cost_what_is_foretold(tiny_bert: Path, tiny_csv: Path, way: str) -> None:
    federation = federate([*classification(tiny_bert, tiny_csv), *ROUNDS, *OTHER_WAYS[way]])
    cost = cost_of(federation.config)
    assert federation.payload() == (cost.payload_up, cost.payload_down, cost.payload_one_off)
    for record in federation.records[1:]:
        assert not record.failed
        assert record.exactness_gap < (1e-6 if way != "a coarse wire" else 0.1)


def test_a_run_leaves_a_head_to_load_and_a_model_to_export(
    tiny_bert: Path, tiny_csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    overrides = [*classification(tiny_bert, tiny_csv), *ROUNDS, "federation.num_rounds=1"]
    summary = serve(load(overrides), LocalGrid.simulation(client_app, {"overrides": join(overrides)}), folder)
    assert "head_only, no adapters, 99 trained parameters" in capsys.readouterr().out
    assert summary["rank"] is None
    assert json.loads((folder / "summary.json").read_text())["rank"] is None
    report = write_report(folder).read_text(encoding="utf-8")
    assert "| method" in report
    assert all(f"| {row} " not in report for row in ("rank", "start", "adapted layers"))
    assert not (folder / "adapter").exists()

    with pytest.raises(SystemExit) as done:
        main(["export", str(folder)])
    assert not done.value.code
    assert capsys.readouterr().err == ""
    trained = model_of(load(overrides), ("film", "sport", "trade"))
    head = load_file(folder / "head.safetensors")
    assert head.keys() == set(trained.head)
    merged: Any = AutoModelForSequenceClassification.from_pretrained(folder / "merged").eval()
    plain: Any = build_model(
        load(overrides).model, load(overrides).adapter, family="head_only", task=TASKS["classification"], labels=("a", "b", "c"), seed=9
    ).model
    assert not plain.load_state_dict(head, strict=False).unexpected_keys
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    with torch.no_grad():
        wanted = trained.model(input_ids=ids).logits
        assert torch.equal(merged(input_ids=ids).logits, wanted)
        # The pooler is drawn from the seed, as tiny_bert's checkpoint is whole: the body's bits are the same.
        assert torch.equal(plain(input_ids=ids).logits, wanted)
    assert torch.equal(merged.classifier.weight, trained.trained()[Name("classifier.weight", HEAD)])


@pytest.mark.parametrize("more", [["data.task=causal_lm", "data.label=null"], ["model.head=none"], ["model.head=[]"]])
def test_nothing_to_train_is_one_line(tiny_bert: Path, tiny_csv: Path, more: list[str]) -> None:
    with pytest.raises(UserError, match=r"^nothing to train: 'head_only' has no adapters, .* has no head; choose a task") as caught:
        federate([*classification(tiny_bert, tiny_csv), *ROUNDS, *more])
    assert "\n" not in str(caught.value)


def test_a_start_is_refused_where_nothing_starts() -> None:
    with pytest.raises(UserError, match=r"init\.kind=gradient: method 'head_only' has no adapters to start; leave init\.kind=null"):
        load(["method=head_only", "init.kind=gradient"])
    assert load(["method=head_only"]).init.kind is None


def test_named_parameters_are_a_head_of_a_language_model_too(tiny_llama: Path, tiny_csv: Path) -> None:
    federation = federate([*language_model(tiny_llama, tiny_csv), *ROUNDS, "federation.num_rounds=1", "model.head=lm_head.weight"])
    assert federation.prepared.adapted.head == ("lm_head.weight",)
    assert federation.records[1].exactness_gap < 1e-6


def test_costs_leave_out_a_method_without_anything_to_train(tiny_llama: Path, tiny_csv: Path) -> None:
    some = ("fed_sb", "head_only", "full", "untouched")
    assert set(costs(language_model(tiny_llama, tiny_csv), some).found) == {"fed_sb", "full"}
    assert costs(classification(tiny_llama, tiny_csv), some).found["head_only"].trained == 3 * 32
    with pytest.raises(UserError, match="nothing to train"):
        costs([*language_model(tiny_llama, tiny_csv), "method=head_only"], some)


def test_the_spec_has_no_factors_anywhere() -> None:
    spec = SPECS["head_only"]
    assert (*spec.factors, *spec.starts) == ()
