"""What privacy cannot be had with is one line, exit status 2, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from fedsb.app.assembly import corpus_of, model_of
from fedsb.cli import main
from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.privacy.models import refuse_mixing_layers
from tests.commands.calls import handlers_given_back
from tests.strategies.private_runs import CLIENT, EXAMPLE, small

Call = Callable[..., tuple[int, str]]
BUDGET = ("privacy=example", "privacy.epsilon=3")
HELD_OUT = ("federation.evaluate_clients=true", "data.client_test_fraction=0.1")
FIRST = ("federation.num_rounds=1", "train.local_steps=1")

MISTAKES = {
    "delta": ([*EXAMPLE, "privacy.delta=0.05"], "privacy.delta=0.05 is not below 1/20 for 'client-0'; it must be, or leaving it null"),
    "epsilon 0": (["privacy=example", "privacy.epsilon=0"], "privacy.epsilon=0.0 is out of range; it must be above 0"),
    "epsilon below 0": (["privacy=client", "privacy.epsilon=-1"], "privacy.epsilon=-1.0 is out of range; it must be above 0"),
    "no noise reaches it": (["privacy=example", "privacy.epsilon=1e-6"], "privacy.epsilon=1e-06 cannot be reached at delta=1e-05 with any"),
    "a client below a batch": ([*EXAMPLE, "train.batch_size=21"], "'client-0' has 20 examples, fewer than train.batch_size=21 (a sampling"),
    "both": ([*BUDGET, "privacy.noise_multiplier=1"], "privacy.epsilon and privacy.noise_multiplier are both given: one follows"),
    "neither": (
        ["privacy=example"],
        "privacy.epsilon and privacy.noise_multiplier are not given; give one of them, as in privacy.epsilon=3",
    ),
    "no unit": (["privacy.epsilon=3"], "privacy.epsilon is given, but privacy.unit=none adds no noise; choose privacy=example or"),
    "a budget and no unit": (["privacy.max_epsilon=3"], "privacy.max_epsilon is given, but privacy.unit=none adds no noise"),
    "evaluation": (
        [*EXAMPLE, "federation.evaluate_clients=true", "data.client_test_fraction=0.1"],
        "federation.evaluate_clients=true with privacy.unit=example: metrics on a client's held-out examples would have no noise; give",
    ),
    "a share of no evaluation": (
        [*EXAMPLE, "privacy.eval_fraction=0.1"],
        "privacy.eval_fraction=0.1 is for metrics on what clients hold out, and none are asked for; set federation.evaluate_clients=true",
    ),
    "shares that leave nothing": (
        [*BUDGET, "init.kind=gradient", "privacy.init_fraction=0.5", "privacy.eval_fraction=0.5", *HELD_OUT],
        "privacy.init_fraction=0.5 and privacy.eval_fraction=0.5 leave training nothing of epsilon; together they must be below 1",
    ),
    "a share of no start": (
        [*EXAMPLE, "privacy.init_fraction=0.2", "init.kind=orthogonal"],
        "privacy.init_fraction=0.2 pays for a start from the clients' data, but init.kind=orthogonal with init.evidence=clients uses none",
    ),
    "normalised sketches of no start": (
        [*EXAMPLE, "privacy.init_normalise=true"],
        "privacy.init_normalise=true is for the noised sketches of a start, and privacy.init_fraction=0 has none; set privacy.init_frac",
    ),
    "normalised sketches and no unit": (["privacy.init_normalise=true"], "privacy.init_normalise is given, but privacy.unit=none adds no"),
    "no noise": (
        ["privacy=example", "privacy.noise_multiplier=0"],
        "privacy.noise_multiplier=0.0 is out of range; it must be in [1e-6, 1e6]",
    ),
    "a clipping norm of no normal number": (
        [*EXAMPLE, "init.kind=gradient", "privacy.init_fraction=0.3", "privacy.init_norm=1e-44"],
        "privacy.init_norm=1e-44 is out of range; it must be in [1e-06, 1e+20]",
    ),
    "a gradient's norm below it": (
        [*EXAMPLE, "privacy.max_grad_norm=1e-7"],
        "privacy.max_grad_norm=1e-07 is out of range; it must be in [1e-06,",
    ),
    "an accountant": ([*EXAMPLE, "privacy.accountant=gdp"], "unknown privacy.accountant 'gdp'"),
    "weights": (["privacy=client", "privacy.noise_multiplier=1"], "privacy.unit=client with federation.weighting=examples: a client with"),
    "a residual": ([*CLIENT, "method=fedex_lora"], "privacy.unit=client is not defined for method=fedex_lora"),
}


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand in an empty folder, and give back the loggers and filters that a command takes over."""
    monkeypatch.chdir(tmp_path)
    with handlers_given_back():
        yield


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tiny_bert: Path, tmp_path: Path) -> Call:
    """Run a small federation by the command line; return its exit status and what it said of mistakes."""

    def run(*overrides: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as done:
            main(["run", *small(tiny_bert, tmp_path, *overrides), "output=run"])
        return int(done.value.code or 0), capsys.readouterr().err

    return run


def only_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) == 1, text
    return lines[0]


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(case: str, call: Call) -> None:
    overrides, message = MISTAKES[case]
    status, err = call(*overrides)
    assert status == 2
    assert only_line(err).startswith(f"error: {message}")
    assert not Path("run").exists()


def test_a_model_that_mixes_examples_is_refused(call: Call, tiny_bert: Path, tmp_path: Path) -> None:
    """Planted in the model that the process keeps, and taken out again."""
    config = load(small(tiny_bert, tmp_path, *EXAMPLE))
    model = model_of(config, corpus_of(config).labels).model
    model.add_module("planted", nn.BatchNorm1d(4))
    try:
        status, err = call(*EXAMPLE)
    finally:
        del model.planted
    assert status == 2
    assert only_line(err).startswith("error: 'planted' (BatchNorm1d) mixes the examples of a batch, so privacy.unit=example cannot hold;")
    assert not Path("run").exists()


def test_layers_that_keep_examples_apart_are_taken() -> None:
    refuse_mixing_layers(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GroupNorm(2, 4)))
    for layer in (nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.SyncBatchNorm(4)):
        with pytest.raises(UserError, match=r"^'1' \(\w*BatchNorm\w*\) mixes the examples of a batch"):
            refuse_mixing_layers(nn.Sequential(nn.Linear(4, 4), layer))


def test_a_base_that_was_quantised_by_others_is_refused() -> None:
    model = nn.Linear(4, 4)
    model.config = SimpleNamespace(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(UserError, match=r"^the model's folder holds it quantised \(quantization_config\)[^\n]*; use one with plain"):
        refuse_mixing_layers(model)


def test_a_run_keeps_its_ledgers_in_its_folder_and_another_run_does_not_take_them_over(call: Call, tmp_path: Path) -> None:
    """The configuration of the first is deleted: what its ledgers hold still is not the second one's."""
    assert call(*EXAMPLE, *FIRST, "plots=true") == (0, "")
    folder = tmp_path / "run"
    assert {path.parent.name for path in folder.glob("ledgers/*/ledger.jsonl")} == {f"client-{i}" for i in range(4)}
    assert not list(tmp_path.glob("home/**/ledger.jsonl"))
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8"))["epsilon"]["max"] > 0
    text = (folder / "report.md").read_text(encoding="utf-8").split("## Privacy")[1]
    assert "| client | epsilon | delta | noise multiplier | sampling rate | steps a round |" in text
    assert "![noise](noise.png)" in text
    for path in [*folder.glob("*.yaml"), *folder.glob("*.json")]:
        path.unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for unit in (("privacy=example", "privacy.noise_multiplier=1"), CLIENT):
        status, err = call(*unit, *FIRST)
        assert status == 2
        assert "already holds a run (ledgers); choose another output=…" in only_line(err)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
