"""Who takes part in the comparison of methods, and the plan: data, budgets, rates, seeds, all fixed before anything is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from strategies import STRATEGIES

SEEDS = (0, 1, 2, 3, 4)  # of the runs that are compared: of their split, draws of clients and starts together
TUNING_SEEDS = (100, 101)  # whose mean loss chooses a rate: by one seed a rate was chosen at which others diverge
FINALISTS = 2  # rates that run with the second tuning seed: the best with the first
RATES = (5e-4, 2e-3, 8e-3, 3.2e-2)
FULL_RATES = (5e-6, 2e-5, 8e-5, 3.2e-4)  # of all weights, which bear a hundredth of these
REFERENCE = "fedavg_lora"
REFERENCE_RANK = 8  # of 4, equal bytes leave rank 1 to methods that send more down than up

SHARED = (
    "model=minilm", "data=files", "data.test_fraction=0.3", "federation.fraction=0.5", "federation.num_rounds=8", "train.local_steps=4",
    "train.batch_size=8", "train.max_length=32", "eval.every=2", "eval.max_examples=400", "plots=false", "progress=lines",
    "train.schedule=cosine", "train.warmup=0.1", "train.clip_norm=1.0",
    "data.client_test_fraction=0.2",  # for all, as fedsa_lora and local_only are measured on it, and nobody is to train on more than they
    "train.autocast=bfloat16",  # half the seconds of float32, and after two rounds its accuracy within 0.003
)  # fmt: skip
DATA: Mapping[str, tuple[str, ...]] = {
    "bbc": ("federation.num_clients=10", "federation.partition.kind=dirichlet", "federation.partition.alpha=0.5"),
    "docstrings": ("federation.num_clients=10", "federation.partition.kind=natural", "federation.partition.column=owner"),
}
VALUES, BYTES = "values", "bytes"
TUNING = ("eval.every=8",)  # of the runs that choose rates: their end alone is looked at


@dataclass(frozen=True)
class Contestant:
    """One row of the tables.

    Attributes:
        overrides: its method and what else makes it.
        budgets: at which it takes part; of both its rank is chosen.
        sized: whether it has a rank to choose.
        rates: what its learning rate is chosen of; none where it does not train.
        at: further overrides at a budget.
        rate_of: whose rate it takes, which trains as it does; None where its own is chosen.
    """

    overrides: tuple[str, ...]
    budgets: tuple[str, ...] = (VALUES, BYTES)
    sized: bool = True
    rates: tuple[float, ...] = RATES
    at: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rate_of: str | None = None


# At equal bytes the start from the clients' gradients as it is shipped (four exchanges at rank + 8) moves more than FedIT's whole run:
# there it takes two exchanges at rank + 2.
THIN = {BYTES: ("init.power_iterations=0", "init.oversample=2")}
# One s for all of LoRA: as shipped it is alpha / rank with an alpha of 8 or 16, and would differ with the rank that the budget leaves.
SCALE, ONE_SCALE = 1.0, "adapter.scale=1.0"
# Runs of a contestant again, to the bit, that its clients measure too, each on what it holds out: what fedsa_lora and local_only, which the
# server can't measure, are held against. Apart, as these measurements are sent and would count as bytes.
AT_CLIENTS = {"fedavg_lora, at clients": "fedavg_lora", "fed_sb, at clients": "fed_sb"}
# Whose own papers give another s: sqrt(r1 r2) in ABBA, 16 / sqrt(rank) in LoRA-One, whose gamma belongs to it.
OWN_SCALE = ("abba", "abba_masked", "abba_alternating", "lora_one")
# What at one rank for all clients is another method, to the bit.
THE_SAME = {"nested_fed_sb": "fed_sb", "raflora": "flexlora"}
# What is not a method as it is shipped, at both budgets; the rest are.
OWN: Mapping[str, Contestant] = {
    "untouched": Contestant(("method=untouched",), (VALUES,), sized=False, rates=()),
    "head_only": Contestant(("method=head_only",), (VALUES,), sized=False),
    "local_only": Contestant(("method=local_only",), (VALUES,)),
    "centralized": Contestant(("method=centralized",), (VALUES,)),
    "full": Contestant(("method=full",), (VALUES,), sized=False, rates=FULL_RATES),
    "fedavg_lora, pissa": Contestant(("method=fedavg_lora", "init.kind=pissa")),
    "lora_one": Contestant(("method=lora_one",), at=THIN),
    "fed_sb": Contestant(("method=fed_sb",), at=THIN),
    "fed_sb, LoRA-One's pair": Contestant(("method=fed_sb", "adapter.options.gamma=128"), at=THIN),
    "fed_sb, orthogonal": Contestant(("method=fed_sb", "init.kind=orthogonal")),
    "abba_core, diagonal": Contestant(("method=abba_core", "adapter.options.diagonal=true")),
}
SHIPPED = {name: Contestant((f"method={name}",)) for name in STRATEGIES if name not in {**OWN, **THE_SAME}}


def scaled(name: str, contestant: Contestant) -> Contestant:
    """Return a contestant at the one scale, where it has adapters and no scale of its own."""
    if not contestant.sized or name in OWN_SCALE:
        return contestant
    return replace(contestant, overrides=(*contestant.overrides, ONE_SCALE))


def at_clients(contestant: Contestant, name: str) -> Contestant:
    """Return a contestant that its clients measure too."""
    return replace(
        contestant, overrides=(*contestant.overrides, "federation.evaluate_clients=true"), budgets=(VALUES,), rates=(), rate_of=name
    )


ALONE: Mapping[str, Contestant] = {name: scaled(name, each) for name, each in {**SHIPPED, **OWN}.items()}
CONTESTANTS: Mapping[str, Contestant] = {**ALONE, **{name: at_clients(ALONE[own], own) for name, own in AT_CLIENTS.items()}}
BASELINES = ("untouched", "head_only", "local_only", "centralized", "full")  # of the values table; shown beside the bytes table too
