"""Who takes part in the comparison of methods, and the plan: data, budgets, rates, seeds, all fixed before anything is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from strategies import STRATEGIES

SEEDS = (0, 1, 2, 3, 4)  # of the runs that are compared: of their split, draws of clients and starts together
TUNING_SEEDS = (100, 101)  # whose mean loss chooses a rate: by one seed a rate was chosen at which others diverge
RATES = (5e-4, 2e-3, 8e-3, 3.2e-2)
FULL_RATES = (5e-6, 2e-5, 8e-5, 3.2e-4)  # of all weights, which bear a hundredth of these
REFERENCE = "fedavg_lora"
REFERENCE_RANK = 4

SHARED = (
    "model=minilm", "data=files", "data.test_fraction=0.3", "federation.fraction=0.5", "federation.num_rounds=8", "train.local_steps=4",
    "train.batch_size=8", "train.max_length=32", "eval.every=4", "eval.max_examples=400", "plots=false", "progress=lines",
    "train.schedule=cosine", "train.warmup=0.1", "train.clip_norm=1.0",
    "train.autocast=bfloat16",  # half the seconds of float32, and after two rounds its accuracy within 0.003
)  # fmt: skip
DATA: Mapping[str, tuple[str, ...]] = {
    "bbc": ("federation.num_clients=10", "federation.partition.kind=dirichlet", "federation.partition.alpha=0.5"),
    "docstrings": ("federation.partition.kind=natural", "federation.partition.column=owner"),
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
    """

    overrides: tuple[str, ...]
    budgets: tuple[str, ...] = (VALUES, BYTES)
    sized: bool = True
    rates: tuple[float, ...] = RATES
    at: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


# At equal bytes the start from the clients' gradients as it is shipped (four exchanges at rank + 8) moves more than FedIT's whole run:
# there it takes two exchanges at rank + 2.
THIN = {BYTES: ("init.power_iterations=0", "init.oversample=2")}
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
CONTESTANTS: Mapping[str, Contestant] = {
    **{name: Contestant((f"method={name}",)) for name in STRATEGIES if name not in {**OWN, **THE_SAME}},
    **OWN,
}
