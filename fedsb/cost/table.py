"""``fedsb cost``: every method side by side for one model, from its configuration alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from fedsb.app.assembly import corpus_of, peopled, task_of
from fedsb.app.prepare import shapes_alone
from fedsb.config.compose import load
from fedsb.config.schema import Config
from fedsb.config.settings import FEDERATED
from fedsb.core.errors import UserError, unknown
from fedsb.core.state import State
from fedsb.cost.foretell import Cost, method_cost, without_values
from fedsb.models.build import build_model
from fedsb.report.table import human_bytes

# Overrides of one method that another may not know.
OWN = ("method=", "method.", "init.kind=", "adapter.options")


@dataclass(frozen=True)
class Costs:
    """What methods cost, and of the others why they do not go with the configuration."""

    found: dict[str, Cost]
    refused: dict[str, str]


def costs(overrides: Sequence[str], methods: Collection[str]) -> Costs:
    """Return the cost of the configuration's own method as given, and of every other one that goes with it, with its own defaults.

    A baseline that is no federation stands there where it is the configuration's own.

    Args:
        overrides: as for ``fedsb run``.
        methods: names of them all.

    Raises:
        UserError: an override that is not valid.
    """
    overrides = [f"+{text}" if text.startswith("cost.rank.") else text for text in overrides]
    given = load(overrides)
    for name in given.cost.rank:
        if name not in methods:
            raise unknown("method", f"cost.rank.{name}", [f"cost.rank.{method}" for method in methods])
    shared = [text for text in overrides if not text.lstrip("+~").startswith(OWN)]
    found: dict[str, Cost] = {}
    refused: dict[str, str] = {}
    for name in methods:
        own = list(overrides) if name == given.method.name else [*shared, f"method={name}", "init.kind=null"]
        rank = given.cost.rank.get(name)
        try:
            config = load([*own, *([f"rank={rank}"] if rank is not None else [])])
            if config.method.setting == FEDERATED or name == given.method.name:
                found[name] = cost_of(peopled(config))
        except UserError as error:
            # What the configuration asks for need not suit every other method.
            if name == given.method.name:
                raise
            refused[name] = str(error)
    return Costs(found, refused)


def cost_of(config: Config) -> Cost:
    """Return the cost of one configuration; the model is built from its configuration on the meta device."""
    task = task_of(config)
    labels = corpus_of(config).labels if task.has_head else ()
    adapted = build_model(
        config.model, config.adapter, family=config.method.adapter, task=task, labels=labels, seed=config.seed, device="meta"
    )
    strategy = shapes_alone(config, adapted)

    def growth(round_number: int, cohort: Sequence[str]) -> State:
        ranks = [strategy.participation.ranks.get(client, config.adapter.rank) for client in cohort]
        return without_values(strategy.growth(round_number, adapted.shapes, ranks))

    cost = method_cost(config, adapted.spec, adapted.layouts, adapted.shapes, growth, strategy.layouts_of)
    cost = replace(cost, at_most=strategy.spends_less)
    return cost if config.federation.num_rounds else replace(cost, trained=0, up=0, down=0, one_off=0, bytes_up=0, bytes_down=0)


def print_costs(overrides: Sequence[str], methods: Collection[str]) -> None:
    """Print the table of all methods and how their totals compare."""
    both = costs(overrides, methods)
    found, config = both.found, peopled(load([text for text in overrides if not text.startswith("cost.rank.")]))
    console = Console(width=None if Console().is_terminal else 144)
    f = config.federation
    console.print(
        f"{config.model.name}: {f.num_clients} clients, fraction {f.fraction:g}, {f.num_rounds} rounds, "
        f"wire {f.wire_dtype}, seed {config.seed}"
    )
    console.print(_values(found))
    console.print(_bytes(found, config.method.name))
    if longer := [f"{name}, {c.rounds} rounds" for name, c in found.items() if c.rounds != f.num_rounds]:
        console.print(f"of other lengths, for their factors learn in turns: {'; '.join(longer)}")
    if twice := [f"{name}, {c.evaluated} rounds" for name, c in found.items() if c.evaluated]:
        console.print(f"to evaluate, clients are sent the state once more (in the bytes over the run alone): {'; '.join(twice)}")
    if bounds := [name for name, c in found.items() if c.at_most]:
        console.print(f"at most, for what is sent of a rank depends on the data: {'; '.join(bounds)}")
    for name, why in both.refused.items():
        console.print(f"not shown: {name}, which does not go with these settings ({why})", soft_wrap=True, highlight=False)


def _values(found: dict[str, Cost]) -> Table:
    table = Table(title="values a client", title_justify="left")
    for column in ("method", "rank", "trained", "up / round", "down / round", "bytes a round", "one-off"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, c in found.items():
        up, down, one_off = (f"{v:,}" for v in (c.up, c.down, c.one_off))
        moved = f"{human_bytes(c.bytes_up)} up, {human_bytes(c.bytes_down)} down"
        table.add_row(name, "-" if c.rank is None else str(c.rank), f"{c.trained:,}", up, down, moved, one_off)
    return table


def _bytes(found: dict[str, Cost], own: str) -> Table:
    """Return the table of whole runs, and how they compare with that of the configuration's own method."""
    table, beside = Table(title="bytes over the run, all clients", title_justify="left"), found[own]
    ratios = (f"down a round / {own}", f"total / {own}") if beside.down else ()
    for column in ("method", "up", "down", "one-off", "total", *ratios):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, c in found.items():
        columns = (c.payload_up, c.payload_down, c.payload_one_off, c.payload)
        shares = (c.bytes_down / beside.bytes_down, c.payload / beside.payload) if ratios else ()
        table.add_row(name, *(f"{v:,}" for v in columns), *(f"{share:.3g}x" for share in shares))
    return table
