"""Every experiment's YAML composes as it stands; the published set-ups are what their sources say."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsb.adapters import SPECS
from fedsb.config.compose import conf_dir, load
from fedsb.config.settings import UNTOUCHED
from fedsb.cost.table import cost_of
from strategies import STRATEGIES

EXPERIMENTS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))
BUDGET = 200e9  # bytes that FlowerTune allows over a run


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_says_what_it_is(name: str) -> None:
    assert load([f"experiment={name}"]).method.name
    lines = Path(conf_dir() / "experiment" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# ")


@pytest.mark.parametrize("method", STRATEGIES)
def test_the_first_look_is_there_for_every_method(method: str) -> None:
    config = load([f"method={method}", "experiment=quick"])
    rounds = 0 if config.method.setting == UNTOUCHED else SPECS[config.method.adapter].turns
    assert (config.method.name, config.federation.num_rounds) == (method, rounds)


# Clients, and how many a round draws: benchmarks/flowertune-llm of Flower's repository.
CHALLENGES = {"general": (20, 2), "finance": (50, 5), "medical": (20, 2), "code": (10, 2)}


@pytest.mark.parametrize("name", CHALLENGES)
def test_the_challenges_have_their_sizes_and_stay_below_their_budget(name: str) -> None:
    config = load([f"experiment=flowertune_{name}", "model=mistral_7b"])
    clients, drawn = CHALLENGES[name]
    federation, train = config.federation, config.train
    assert (federation.num_clients, round(federation.fraction * clients), federation.num_rounds) == (clients, drawn, 200)
    assert (train.local_steps, train.batch_size, train.max_length, config.adapter.rank, config.adapter.alpha) == (10, 16, 512, 32, 64.0)
    # Its template says `BitsAndBytesConfig(load_in_4bit=True)`, and bitsandbytes' floats are then fp4.
    assert load([f"experiment=flowertune_{name}"]).model.quantize == "fp4"
    found = cost_of(config)
    # 32 layers of q (4096 x 4096) and v (1024 x 4096) at rank 32, both ways, 2,000 times for every 10 clients drawn.
    values = 32 * 32 * (2 * 4096 + 1024 + 4096)
    assert (found.up, found.down) == (values, values)
    assert found.payload == 2 * 4 * values * drawn * 200 < BUDGET
