"""How a simulation deals the training part out to clients, as flwr-datasets does.

Rows are shuffled first, from a stream of the seed, because some partitioners cut the table where it stands. What draws is drawn by
flwr-datasets itself; what only cuts is cut here, to the same parts, for its import takes each process more than a second.
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsb.config.schema_federation import PartitionConfig
from fedsb.core.errors import UserError, unknown
from fedsb.core.rng import numpy_generator, stream_seed
from fedsb.data.examples import Examples, natural_order
from fedsb.data.grouping import Grouping

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


VISUALIZATION = "flwr_datasets.visualization"


def _partitioners() -> Any:
    # Here and not above: a node with data of its own deals nothing out.
    with _without_plots():
        import flwr_datasets.partitioner

        return flwr_datasets.partitioner


@contextmanager
def _without_plots() -> Iterator[None]:
    """Let flwr-datasets be imported without its plots, whose libraries take seconds; who asks for them later gets them."""
    if "flwr_datasets" in sys.modules:
        yield
        return
    sys.modules[VISUALIZATION] = ModuleType(VISUALIZATION)
    try:
        yield
    finally:
        del sys.modules[VISUALIZATION]
        if "flwr_datasets" in sys.modules:
            vars(sys.modules["flwr_datasets"]).pop("visualization", None)


@dataclass(frozen=True)
class _Deal:
    """What a partitioner works on; ``rows`` are the indices of ``train``, shuffled."""

    train: Examples
    cfg: PartitionConfig
    names: tuple[str, ...]
    seed: int
    rows: tuple[int, ...]
    grouping: Grouping | None = None


def partition(
    train: Examples, cfg: PartitionConfig, names: Sequence[str], seed: int, grouping: Grouping | None = None
) -> dict[str, tuple[int, ...]]:
    """Deal examples out to clients: each goes to exactly one, and no client goes empty.

    Args:
        train: the training part.
        cfg: the kind of partition and its options.
        names: clients, in order.
        seed: seed of the run.
        grouping: of the examples, for a kind that goes by one.

    Returns:
        Sorted indices of ``train`` for every client, in the order of ``names``.

    Raises:
        UserError: fewer examples than clients, a client without examples, or options that do not fit the data.
    """
    kind = str(cfg.kind)
    if kind not in PARTITIONERS:
        raise unknown("federation.partition.kind", kind, PARTITIONERS)
    if len(train) < len(names):
        raise UserError(f"{len(train)} training examples for {len(names)} clients; lower federation.num_clients or bring more data")
    rows = numpy_generator(seed, "partition.shuffle").permutation(len(train)).tolist()
    parts = PARTITIONERS[kind](_Deal(train, cfg, tuple(names), seed, tuple(rows), grouping))
    return {name: tuple(sorted(part)) for name, part in zip(names, parts, strict=True)}


def _load(partitioner: Partitioner, rows: Sequence[int], keys: Sequence[int], count: int) -> list[list[int]]:
    """Run a partitioner on a table of ``rows`` keyed by ``keys``; its warnings and progress bars stay off the terminal."""
    import datasets

    partitioner.dataset = datasets.Dataset.from_dict({"row": list(rows), "key": list(keys)})
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        return [list(partitioner.load_partition(i)["row"]) for i in range(count)]


def _iid(deal: _Deal) -> list[list[int]]:
    return [part.tolist() for part in np.array_split(deal.rows, len(deal.names))]


def _dirichlet(deal: _Deal) -> list[list[int]]:
    """Draw each class's shares from Dirichlet(alpha); the partitioner draws anew, up to eleven times, while a client is empty."""
    return _drawn_by(deal, _classes(deal))


def _by_group(deal: _Deal) -> list[list[int]]:
    """Draw each group's shares from Dirichlet(alpha), as a class's."""
    if deal.grouping is None:
        raise UserError(f"federation.partition.kind={deal.cfg.kind} goes by groups that are not known here; use another kind")
    return _drawn_by(deal, [deal.grouping.of[row] for row in deal.rows])


def _drawn_by(deal: _Deal, keys: list[int]) -> list[list[int]]:
    count = len(deal.names)
    drawing = _partitioners().DirichletPartitioner(
        num_partitions=count,
        partition_by="key",
        alpha=deal.cfg.alpha,
        min_partition_size=1,
        seed=stream_seed(deal.seed, "partition.dirichlet"),
    )
    try:
        return _load(drawing, deal.rows, keys, count)
    except ValueError:
        raise UserError(
            f"federation.partition.alpha={deal.cfg.alpha} leaves one of {count} clients without examples in every one of 11 draws; "
            "raise it, lower federation.num_clients, or use federation.partition.kind=iid"
        ) from None


def _shard(deal: _Deal) -> list[list[int]]:
    """Cut the examples, sorted by class, into equal shards and deal each client ``shards_per_client`` of them.

    The partitioner drops what its equal shards leave over, so it deals whole shards here, which differ by one example at most.
    """
    each, count = deal.cfg.shards_per_client, len(deal.names)
    if len(deal.rows) < each * count:
        raise UserError(
            f"federation.partition.shards_per_client={each} for {count} clients needs {each * count} examples, there are "
            f"{len(deal.rows)}; lower it or federation.num_clients"
        )
    ordered = np.array(deal.rows)[np.argsort(_classes(deal), kind="stable")]
    shards = [shard.tolist() for shard in np.array_split(ordered, each * count)]
    dealing = _partitioners().ShardPartitioner(count, "key", num_shards_per_partition=each, seed=stream_seed(deal.seed, "partition.shard"))
    hands = _load(dealing, range(len(shards)), range(len(shards)), count)
    return [[row for shard in hand for row in shards[shard]] for hand in hands]


def _size(deal: _Deal) -> list[list[int]]:
    """Deal in proportion to ``sizes``, by largest remainder."""
    sizes, count = deal.cfg.sizes, len(deal.names)
    if sizes is None or len(sizes) != count:
        given = "null" if sizes is None else f"{len(sizes)} numbers"
        raise UserError(f"federation.partition.sizes is {given} for {count} clients; give one relative size a client")
    if min(sizes) <= 0:
        raise UserError(f"federation.partition.sizes holds {min(sizes)}; every relative size must be above 0")
    exact = np.array(sizes) / sum(sizes) * len(deal.rows)
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: len(deal.rows) - counts.sum()]] += 1
    if not counts.all():
        raise UserError(
            f"federation.partition.sizes leaves client '{deal.names[int(counts.argmin())]}' without any of {len(deal.rows)} examples; "
            "raise its size or bring more data"
        )
    return [part.tolist() for part in np.split(deal.rows, np.cumsum(counts)[:-1])]


def _quantity(deal: _Deal) -> list[list[int]]:
    """Draw the sizes from Dirichlet(alpha), one example each apart, as Li et al. 2022 (arXiv:2102.02079) do for quantity skew."""
    count = len(deal.names)
    shares = numpy_generator(deal.seed, "partition.quantity").dirichlet([deal.cfg.alpha] * count)
    exact = shares * (len(deal.rows) - count)
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: len(deal.rows) - count - counts.sum()]] += 1
    return [part.tolist() for part in np.split(deal.rows, np.cumsum(counts + 1)[:-1])]


def _natural(deal: _Deal) -> list[list[int]]:
    """Give each client one owner: the one of its own name where names and owners are the same set, else in sorted order."""
    if deal.train.owners is None:
        raise UserError("federation.partition.kind=natural needs the column that names the owner: add federation.partition.column=…")
    owners = natural_order(deal.train.owners)
    if len(owners) != len(deal.names):
        raise UserError(
            f"federation.partition.column={deal.cfg.column} names {len(owners)} owners in the training part for {len(deal.names)} clients; "
            f"leave federation.num_clients out, or choose another column"
        )
    parts: dict[str, list[int]] = {owner: [] for owner in (deal.names if set(owners) == set(deal.names) else owners)}
    for row in deal.rows:
        parts[deal.train.owners[row]].append(row)
    return list(parts.values())


def _classes(deal: _Deal) -> list[int]:
    targets = deal.train.targets
    if not targets or not isinstance(targets[0], int):
        raise UserError(
            f"federation.partition.kind={deal.cfg.kind} goes by class labels, which this task has not; use iid, size or natural, or length"
        )
    return [int(targets[row]) for row in deal.rows]


PARTITIONERS: Mapping[str, Callable[[_Deal], list[list[int]]]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "shard": _shard,
    "size": _size,
    "natural": _natural,
    "length": _by_group,
    "cluster": _by_group,
    "quantity": _quantity,
}
