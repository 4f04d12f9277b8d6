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


# The columns of README's table: the first two challenges move the same.
COSTED = (("general", "medical"), ("code",), ("finance",))
GROWING = ("fedex_lora", "flora")  # what 200 rounds of them move takes seconds to count


def stated() -> tuple[str, list[str], dict[str, list[str]]]:
    """Return README's section on published set-ups, the head of its table, and its lines by method."""
    section = Path("README.md").read_text(encoding="utf-8").split("### Published set-ups")[1].split("\n### ")[0]
    head, clients, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "]
    assert clients[1:] == ["{}, {}".format(*CHALLENGES[names[0]]) for names in COSTED]
    return " ".join(section.split()), head[1:], {line[0].split("`")[1]: line[1:] for line in lines}


def test_the_readme_names_the_budget_and_the_methods_that_it_costs() -> None:
    section, head, lines = stated()
    assert f"allow {BUDGET / 1e9:.0f} GB over a run" in section
    assert head == [", ".join(names) for names in COSTED]
    assert sorted(lines) == sorted(["fed_sb", "ffa_lora", "fedavg_lora", *GROWING])
    general, medical = (load([f"experiment=flowertune_{name}", "model=mistral_7b"]) for name in COSTED[0])
    assert (general.federation, general.adapter, general.train) == (medical.federation, medical.adapter, medical.train)


@pytest.mark.parametrize("method", ["fed_sb", "ffa_lora", "fedavg_lora", *(pytest.param(name, marks=pytest.mark.slow) for name in GROWING)])
def test_the_readme_states_what_a_method_moves_in_each_challenge(method: str) -> None:
    """As ``fedsb cost`` has it."""
    for (challenge, *_), gigabytes in zip(COSTED, stated()[2][method], strict=True):
        config = load([f"method={method}", f"experiment=flowertune_{challenge}", "model=mistral_7b"])
        assert f"{cost_of(config).payload / 1e9:,.1f}" == gigabytes, challenge
