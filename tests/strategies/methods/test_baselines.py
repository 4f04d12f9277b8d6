"""What is no federation, in the same command: the base as it is, each client alone, everybody's data at one, and all weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsb.config.compose import as_yaml, load, read
from fedsb.core.errors import UserError
from fedsb.core.state import HEAD
from fedsb.cost.table import cost_of
from fedsb.run.records import SHARED
from tests.strategies.federations import Federation, classification, federate

SCHEDULE = ["federation.num_rounds=2", "train.lr=0.02", "init.kind=null"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))


@pytest.fixture
def data(tiny_bert: Path, tiny_csv: Path) -> list[str]:
    return [*classification(tiny_bert, tiny_csv), *SCHEDULE]


def moved(federation: Federation) -> bool:
    before, after = federation.kept.states[0], federation.kept.states[-1]
    return any(not torch.equal(t, before[name]) for name, t in after.items())


def test_the_untouched_base_is_measured_once_and_nothing_travels(data: list[str]) -> None:
    federation, trained = federate([*data, "method=untouched"]), federate([*data, "method=fedavg_lora"])
    assert [record.round for record in federation.records] == [0]
    assert federation.payload() == (0, 0, 0)
    assert federation.records[0].metrics == trained.records[0].metrics  # the one that every method starts from
    assert not moved(federation)
    cost = cost_of(federation.config)
    assert (cost.trained, cost.up, cost.down, cost.one_off, cost.payload) == (0, 0, 0, 0, 0)


def test_clients_measure_the_untouched_base_where_they_are_asked_to(data: list[str]) -> None:
    """What it is on each client's own part, which personal models have as what is shared of them, costs the bytes that it takes."""
    asked = ["federation.evaluate_clients=true", "data.client_test_fraction=0.3", "federation.fraction=0.4"]
    federation, personal = federate([*data, *asked, "method=untouched"]), federate([*data, *asked, "method=fedsa_lora"])
    (start,) = federation.records
    shared = {
        client: {name.removeprefix(SHARED): value for name, value in row.items() if name.startswith(SHARED)}
        for client, row in personal.records[-1].client_metrics.items()
    }
    assert len(start.client_metrics) == 5
    for client, row in start.client_metrics.items():
        assert row == pytest.approx(shared[client])
    cost = cost_of(federation.config)
    assert federation.payload() == (0, cost.payload_down, 0)
    assert start.measured_by == "server"


@pytest.mark.parametrize("kind", ["gradient", "pissa"])
def test_the_untouched_base_is_w0_whatever_start_a_sweep_asks_for(kind: str, data: list[str]) -> None:
    federation = federate([*data, "method=untouched", f"init.kind={kind}"])
    assert federation.payload() == (0, 0, 0)
    assert federation.records[0].metrics == federate([*data, "method=fedavg_lora", "federation.num_rounds=1"]).records[0].metrics


@pytest.mark.parametrize("unit", ["example", "client"])
def test_the_untouched_base_needs_no_privacy(unit: str) -> None:
    with pytest.raises(UserError, match=rf"^privacy\.unit={unit} with method=untouched: nobody trains; leave privacy out$"):
        load(["method=untouched", f"privacy={unit}", "privacy.epsilon=3", "federation.weighting=uniform"])


def test_rounds_are_none_where_nobody_trains_and_nowhere_else() -> None:
    assert load(["method=untouched", "federation.num_rounds=7"]).federation.num_rounds == 0
    with pytest.raises(UserError, match=r"^federation\.num_rounds=0 is out of range; it must be at least 1 \(method=untouched"):
        load(["federation.num_rounds=0"])


def test_who_trains_alone_sends_nothing_and_learns(data: list[str]) -> None:
    federation = federate([*data, "method=local_only", "train.local_steps=8"])
    assert federation.payload() == (0, 0, 0)
    first, last = federation.records[1], federation.records[-1]
    assert first.train_loss is not None
    assert last.train_loss is not None
    assert last.train_loss < first.train_loss
    assert len({row["loss"] for row in last.client_metrics.values()}) == 5  # each has a model of its own


def test_who_trains_alone_does_not_hear_of_others(data: list[str]) -> None:
    """What a client reaches is the same whoever is there beside."""
    together = federate([*data, "method=local_only"]).records
    absent = federate([*data, "method=local_only", "faults.dropout=0.4", "seed=0", "federation.min_replies=1"]).records
    assert any(record.failed for record in absent)
    whole = set.intersection(*({*record.clients} for record in absent[1:]))
    assert whole
    for client in whole:
        assert absent[-1].client_metrics[client] == together[-1].client_metrics[client]


@pytest.mark.parametrize(("family", "as_method"), [("lora", "fedavg_lora"), ("lora_sb", "fed_sb")])
def test_pooled_data_are_one_client_that_sees_as_much_as_all(data: list[str], family: str, as_method: str) -> None:
    shared = [*data, "adapter.alpha=8"]
    pooled = federate([*shared, "method=centralized", f"method.adapter={family}"])
    one = ["federation.num_clients=1", "federation.partition.kind=iid", "federation.partition.sizes=null", "train.local_steps=10"]
    assert pooled.sha256 == federate([*shared, f"method={as_method}", *one, "init.num_examples=160"]).sha256
    assert max(record.exactness_gap or 0 for record in pooled.records[1:]) < 1e-6
    assert sum(pooled.prepared.strategy.counts.values()) == sum(federate([*data, "method=fedavg_lora"]).prepared.strategy.counts.values())


def test_pooling_counts_the_steps_of_a_round_and_is_done_once(tmp_path: Path) -> None:
    config = load(["method=centralized", "federation.num_clients=8", "federation.fraction=0.5", "train.local_steps=3", "rank=2"])
    assert (config.federation.num_clients, config.federation.fraction, config.train.local_steps) == (1, 1.0, 12)
    assert config.init.num_examples == load([]).init.num_examples  # LoRA starts without a look at the data
    sketched = load(["method=centralized", "method.adapter=lora_sb", "federation.num_clients=8"])
    assert sketched.init.num_examples == 8 * config.init.num_examples
    public = load(["method=centralized", "method.adapter=lora_sb", "init.evidence=public", "data.public_fraction=0.1"])
    assert public.init.num_examples == config.init.num_examples
    (tmp_path / "config.yaml").write_text(as_yaml(config), encoding="utf-8")
    assert read(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["federation.fraction=0.1"],
            r"^method=centralized with federation\.fraction=0\.1: .* set train\.local_steps, .*federation\.fraction=1$",
        ),
        (
            ["federation.partition.kind=natural", "federation.partition.column=owner", "train.local_steps=3"],
            r"partition\.kind=natural and train\.local_steps=3: .* set federation\.num_clients$",
        ),
        (
            ["federation.partition.kind=natural", "federation.partition.column=owner", "method.adapter=lora_sb"],
            r"partition\.kind=natural and init\.num_examples=32: .* set federation\.num_clients$",
        ),
        (
            ["privacy=client", "privacy.epsilon=3", "federation.weighting=uniform"],
            r"^privacy\.unit=client with method=centralized: one client holds everybody's examples, .* use privacy=example$",
        ),
        (["method.adapter=flora"], r"^method\.adapter=flora with method=centralized: nobody would keep its B$"),
        (["method.adapter=fedsa_lora"], r"^method\.adapter=fedsa_lora with method=centralized: nobody would keep its B$"),
        (["method.adapter=lorra"], "did you mean"),
    ],
)
def test_what_pooling_does_not_go_with_is_said(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(["method=centralized", *overrides])


def test_all_weights_are_averaged(data: list[str]) -> None:
    federation = federate([*data, "method=full", "train.lr=0.001"])
    adapted = federation.prepared.adapted
    assert not adapted.layers
    assert {name for name, _ in adapted.model.named_parameters()} == {*adapted.head}
    still = {name.module for name, t in federation.kept.states[-1].items() if torch.equal(t, federation.kept.states[0][name])}
    assert not {name for name in still if "word_embeddings" in name or "layer." in name}
    assert federation.payload()[0] == 2 * 5 * 4 * sum(p.numel() for p in adapted.model.parameters())
    assert {name.role for name in federation.kept.states[-1]} == {HEAD}


def test_a_method_is_of_its_own_setting() -> None:
    with pytest.raises(UserError, match=r"^method\.setting=pooled is not that of method 'fedavg_lora'; it must be federated$"):
        load(["method=fedavg_lora", "method.setting=pooled"])


def test_all_weights_are_all() -> None:
    with pytest.raises(UserError, match=r"^model\.head=auto: method 'full' needs model\.head=\*; leave model\.head out"):
        load(["method=full", "model.head=auto"])


def test_all_weights_have_no_gradients_by_example() -> None:
    with pytest.raises(UserError, match=r"^privacy\.unit=example: method 'full' needs privacy\.unit!=example; leave privacy\.unit out"):
        load(["method=full", "privacy=example", "privacy.epsilon=3"])
