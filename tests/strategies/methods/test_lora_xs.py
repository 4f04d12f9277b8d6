"""LoRA-XS is Fed-SB from W0's singular vectors, without their journey; who computes others is refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message
from safetensors.torch import load_file, save_file

from fedsb.app.own_factors import made_again
from fedsb.client_app import app as client_app
from fedsb.core.errors import UserError
from fedsb.core.prints import PROBES
from fedsb.cost.table import cost_of
from fedsb.models.build import forget_models
from fedsb.privacy.codes import CODES
from fedsb.run.checkpoint import START, Snapshot
from fedsb.wire.frozen import FrozenLog
from strategies.carried import remember
from tests.strategies.federations import ClientCall, Federation, classification, federate
from tests.strategies.private_runs import EXAMPLE, run_privately, small
from tests.strategies.rounds import FEWER, ROUNDS

XS = "method=lora_xs"
Run = Callable[..., Federation]


@pytest.fixture
def run(tiny_bert: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    return lambda *more, **given: federate([*classification(tiny_bert, tiny_csv), *ROUNDS, *more], **given)


def test_it_is_fed_sb_to_the_bit_without_the_one_off(run: Run) -> None:
    sent, made = run("method=fed_sb", "init.kind=weight_svd"), run(XS)
    for one, other in zip(sent.kept.states, made.kept.states, strict=True):
        assert {name.role for name in one} == {"R", "head"}
        assert all(torch.equal(t, other[name]) for name, t in one.items())
    for basis in (made.kept.bases[0], made.kept.bases[-1]):
        assert all(torch.equal(t, basis[name]) for name, t in sent.kept.bases[0].items())
    measured = [[(r.metrics, r.train_loss, r.exactness_gap, r.payload_up, r.payload_down) for r in f.records] for f in (sent, made)]
    assert measured[0] == measured[1]
    assert [record.payload_one_off for record in made.records] == [0] * len(made.records)
    assert sent.payload()[2] == cost_of(sent.config).payload_one_off > 0


@pytest.fixture
def other_base(tiny_bert: Path, tmp_path: Path) -> ClientCall:
    """Let client-1 hold another model of the same shape."""
    other = tmp_path / "other"
    shutil.copytree(tiny_bert, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: t + 0.01 * torch.sin(1e3 * t) for name, t in weights.items()}, other / "model.safetensors", {"format": "pt"})

    def call(message: Message, context: Context) -> Message:
        told = message.content.config_records.get("config") or {}
        if told.get("client") != "client-1":
            return client_app(message, context)
        swapped = str(context.run_config["overrides"]).replace(str(tiny_bert), str(other))
        return client_app(message, Context(context.run_id, context.node_id, context.node_config, context.state, {"overrides": swapped}))

    return call


def test_a_client_whose_start_is_another_one_is_told_so_and_counts_for_nothing(run: Run, other_base: ClientCall) -> None:
    federation = run(XS, FEWER, "federation.fraction=1", "federation.num_rounds=1", app=other_base)
    forget_models()
    said = (
        r"the start of 'client-1' differs from the server's by \d\.\de[+-]\d+ of its norm \(1e-04 is allowed\); "
        r"give it the same model, or use method=fed_sb, which sends its B and A$"
    )
    assert set(federation.records[1].failed) == {"client-1"}
    assert re.search(said, federation.records[1].failed["client-1"])
    assert set(federation.records[1].clients) == {"client-0", "client-2", "client-3", "client-4"}


def test_under_privacy_such_a_client_says_so_by_a_code(tiny_bert: Path, tmp_path: Path, other_base: ClientCall) -> None:
    """And trains nothing: no noisy step is spent on it."""
    run = run_privately(small(tiny_bert, tmp_path, *EXAMPLE, XS, FEWER, "federation.num_rounds=1"), tmp_path / "run", app=other_base)
    forget_models()
    assert run.records[1].failed == {"client-1": CODES["start"].text}
    spent = {path.parent.name for path in (tmp_path / "run").glob("ledgers/*/*") if "train" in path.read_text(errors="replace")}
    assert len(spent) == 3


def test_a_run_goes_on_and_is_looked_at_with_its_own_start_alone(run: Run, tiny_bert: Path, tmp_path: Path) -> None:
    one = run(XS, "federation.num_rounds=1")
    config, adapted = one.config, one.fresh_model()
    left = Snapshot(1, one.kept.states[-1], FrozenLog(), remember(one.prepared.strategy))
    made = made_again(config, adapted, left)
    assert all(torch.equal(t, one.kept.bases[-1][name]) for name, t in made.items())
    other = replace(left.carried, facts={**left.carried.facts, START: [0.0] * PROBES})
    with pytest.raises(
        UserError, match=r"^the start of this run, as computed here, differs by .* use the machine and the versions that it"
    ):
        made_again(config, adapted, replace(left, carried=other))


def test_fed_sb_takes_such_a_client_in(run: Run, other_base: ClientCall) -> None:
    federation = run("method=fed_sb", "init.kind=weight_svd", "federation.fraction=1", "federation.num_rounds=1", app=other_base)
    forget_models()
    assert not federation.records[1].failed
