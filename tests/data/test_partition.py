"""Partitions: a disjoint cover without an empty client, the same for the same seed, and what an impossible one says."""

from __future__ import annotations

import random
import subprocess
import sys

import datasets
import numpy as np
import pytest
from flwr_datasets import partitioner
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedsb.config.checks import CHOICES
from fedsb.core.errors import UserError
from fedsb.core.rng import numpy_generator
from fedsb.data import PARTITIONERS, Examples, partition
from fedsb.data.grouping import Grouping, by_length
from fedsb.data.skew import skew_of


def _train(targets, owners=None):
    return Examples(tuple(map(str, range(len(targets)))), targets=tuple(targets), owners=owners)


def _names(count):
    return tuple(f"client-{i}" for i in range(count))


def test_every_configurable_kind_has_a_partitioner():
    assert set(PARTITIONERS) == set(CHOICES["federation.partition.kind"]) - {None}


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(sorted(PARTITIONERS)), st.integers(1, 6), st.integers(0, 3))
def test_a_partition_is_a_disjoint_cover_that_the_seed_fixes(partition_config, data, kind, clients, seed):
    targets = data.draw(st.lists(st.integers(0, 3), min_size=2 * clients, max_size=60))
    owners = tuple(f"o{i % clients}" for i in range(len(targets)))
    sizes = tuple(data.draw(st.lists(st.floats(0.5, 1), min_size=clients, max_size=clients)))
    cfg = partition_config(kind=kind, alpha=1.0, sizes=sizes, column="owner")
    train = _train(targets, owners)
    grouping = Grouping("cluster", ("a", "b", "c", "d"), tuple(targets)) if kind in ("length", "cluster") else None
    try:
        parts = partition(train, cfg, _names(clients), seed, grouping)
    except UserError:
        assume(kind not in ("dirichlet", "size", "length", "cluster"))
        raise
    assert tuple(parts) == _names(clients)
    assert sorted(i for part in parts.values() for i in part) == list(range(len(targets)))
    assert all(part and list(part) == sorted(part) for part in parts.values())
    assert parts == partition(train, cfg, _names(clients), seed, grouping)


@settings(max_examples=30, deadline=None)
@given(st.data(), st.integers(1, 7), st.integers(0, 3))
def test_what_only_cuts_cuts_as_flwr_datasets_does(partition_config, data, clients, seed):
    rows = data.draw(st.integers(clients, 40))
    owners = tuple(f"o{i % clients}" for i in range(rows))
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=clients, max_size=clients).filter(lambda s: rows >= sum(s)))
    sizes[-1] += rows - sum(sizes)
    shuffled = numpy_generator(seed, "partition.shuffle").permutation(rows).tolist()
    whole = datasets.Dataset.from_dict({"row": shuffled, "owner": [owners[row] for row in shuffled]})
    for kind, theirs in {
        "iid": partitioner.IidPartitioner(clients),
        "size": partitioner.SizePartitioner(list(sizes)),
        "natural": partitioner.NaturalIdPartitioner("owner"),
    }.items():
        theirs.dataset = whole
        cfg = partition_config(kind=kind, sizes=tuple(map(float, sizes)), column="owner")
        found = list(partition(_train([0] * rows, owners), cfg, _names(clients), seed).values())
        wanted = [tuple(sorted(theirs.load_partition(i)["row"])) for i in range(clients)]
        assert sorted(found) == sorted(wanted) if kind == "natural" else found == wanted


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "shard", "size"])
def test_another_seed_deals_anew_and_no_global_generator_moves(kind, partition_config, capsys):
    cfg, train = partition_config(kind=kind, sizes=(1.0, 2.0, 3.0)), _train([i % 5 for i in range(100)])
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert partition(train, cfg, _names(3), 0) != partition(train, cfg, _names(3), 1)
    assert before == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert capsys.readouterr() == ("", "")


def test_iid_parts_differ_by_one_and_mix_the_classes(partition_config):
    parts = partition(_train([0] * 50 + [1] * 51), partition_config(kind="iid"), _names(4), 0)
    assert sorted(map(len, parts.values())) == [25, 25, 25, 26]
    assert all(5 < sum(i < 50 for i in part) < 20 for part in parts.values())


def test_a_smaller_alpha_skews_more(partition_config):
    train = _train([i % 4 for i in range(400)])

    def skew(alpha):
        parts = partition(train, partition_config(kind="dirichlet", alpha=alpha), _names(4), 0)
        return np.mean([np.bincount([i % 4 for i in part], minlength=4).max() / len(part) for part in parts.values()])

    assert skew(0.1) > skew(1.0) > skew(100.0)


def test_shards_give_each_client_few_classes_and_equal_parts(partition_config):
    parts = partition(_train([i % 10 for i in range(203)]), partition_config(kind="shard", shards_per_client=2), _names(5), 0)
    assert {len(part) for part in parts.values()} <= {40, 41, 42}
    assert max(len({i % 10 for i in part}) for part in parts.values()) <= 4


def test_sizes_are_relative(partition_config):
    parts = partition(_train([0] * 100), partition_config(kind="size", sizes=(1.0, 2.0, 7.0)), _names(3), 0)
    assert [len(part) for part in parts.values()] == [10, 20, 70]


def test_owners_go_to_clients_in_sorted_order_or_to_their_own_names(partition_config):
    train, cfg = _train([0] * 4, owners=("10", "9", "10", "9")), partition_config(kind="natural", column="site")
    assert partition(train, cfg, _names(2), 0) == {"client-0": (1, 3), "client-1": (0, 2)}
    assert partition(train, cfg, ("10", "9"), 0) == {"10": (0, 2), "9": (1, 3)}


@pytest.mark.parametrize(
    ("changes", "targets", "message"),
    [
        ({"kind": "iid"}, [0, 1], r"2 training examples for 3 clients; lower federation.num_clients"),
        (
            {"kind": "dirichlet", "alpha": 1e-3},
            [0] * 9,
            r"partition.alpha=0.001 leaves one of 3 clients without examples in every one of 11",
        ),
        ({"kind": "dirichlet"}, [0.5] * 9, r"partition.kind=dirichlet goes by class labels, .*; use iid, size or natural"),
        ({"kind": "shard"}, [0.5] * 9, r"partition.kind=shard goes by class labels"),
        ({"kind": "shard", "shards_per_client": 4}, [0] * 9, r"shards_per_client=4 for 3 clients needs 12 examples, there are 9"),
        ({"kind": "size", "sizes": (1.0, 2.0)}, [0] * 9, r"partition.sizes is 2 numbers for 3 clients; give one relative size a client"),
        ({"kind": "size"}, [0] * 9, r"partition.sizes is null for 3 clients"),
        ({"kind": "size", "sizes": (1.0, 0.0, 1.0)}, [0] * 9, r"partition.sizes holds 0.0; every relative size must be above 0"),
        ({"kind": "size", "sizes": (1.0, 1.0, 999.0)}, [0] * 9, r"sizes leaves client 'client-0' without any of 9 examples"),
        ({"kind": "natural"}, [0] * 9, r"add federation.partition.column=…"),
        ({"kind": "striped"}, [0] * 9, r"unknown federation.partition.kind 'striped'"),
    ],
)
def test_an_impossible_partition_is_one_line(changes, targets, message, partition_config):
    with pytest.raises(UserError, match=message):
        partition(_train(targets), partition_config(**changes), _names(3), 0)


def test_a_wrong_number_of_owners_says_how_many(partition_config):
    train = _train([0] * 4, owners=("a", "b", "a", "b"))
    with pytest.raises(UserError, match=r"column=site names 2 owners .* for 3 clients; leave federation.num_clients out"):
        partition(train, partition_config(kind="natural", column="site"), _names(3), 0)


def test_dealing_out_loads_what_draws_and_no_plotting_library_and_leaves_the_plots_to_who_asks_for_them():
    program = """
import sys
from fedsb.data.partition import PARTITIONERS, partition
from fedsb.data.examples import Examples
from fedsb.config.schema_federation import PartitionConfig
partition(Examples(tuple("abcdef"), owners=tuple("ababab")), PartitionConfig("iid", 1.0, 2, None, None, 8), ("a", "b"), 0)
assert not {"datasets", "pandas", "flwr_datasets"} & set(sys.modules)
config = PartitionConfig("dirichlet", 100.0, 2, None, None, 8)
partition(Examples(tuple("abcdef"), targets=(0, 1) * 3), config, ("a", "b"), 0)
assert "flwr_datasets" in sys.modules and not {"seaborn", "matplotlib", "scipy"} & set(sys.modules)
from flwr_datasets.visualization import plot_label_distributions
from flwr_datasets import visualization
assert visualization.plot_label_distributions is plot_label_distributions
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(2, 6))
def test_groups_by_length_are_bands_of_lengths(lengths, count):
    grouping = by_length(Examples(tuple("x" * length for length in lengths)), count)
    assert len(grouping.of) == len(lengths)
    assert set(grouping.of) == set(range(len(grouping.names)))
    assert len(grouping.names) <= count
    for (here, mine), (there, other) in zip(
        pairs := sorted(zip(lengths, grouping.of, strict=True)), pairs[1:], strict=False
    ):  # longer texts are in no earlier group, and equal ones in one
        assert mine <= other
        assert here != there or mine == other


def test_long_and_short_texts_part_where_alpha_is_small(partition_config):
    train = Examples(tuple("x" * (10 if i % 2 else 500) for i in range(200)))
    grouping = by_length(train, 2)
    assert grouping.names == ("10 to 10 characters", "500 to 500 characters")
    skews = []
    for alpha in (0.05, 100.0):
        parts = partition(train, partition_config(kind="length", alpha=alpha), _names(4), 0, grouping)
        skews.append(skew_of(train, parts, (), by="length", grouping=grouping))
    assert skews[0].group_figure > 0.3 > 0.15 > skews[1].group_figure
    assert f"length skew {skews[0].group_figure:.2f} over 2 groups" in skews[0].line()


def test_quantity_skews_sizes_alone_and_leaves_nobody_empty(partition_config):
    train, spread = _train([i % 2 for i in range(400)]), []
    for alpha in (0.1, 1000.0):
        parts = partition(train, partition_config(kind="quantity", alpha=alpha), _names(5), 0)
        spread.append(skew_of(train, parts, ("a", "b"), by="quantity"))
    assert min(spread[0].sizes.values()) >= 1
    equal = sum(abs(size / 400 - 1 / 5) for size in spread[0].sizes.values()) / 2
    assert spread[0].size_figure == pytest.approx(equal)
    assert spread[0].size_figure > 0.2 > 0.05 > spread[1].size_figure
    assert f"size skew {equal:.2f}" in spread[0].line()


def test_a_kind_that_goes_by_groups_says_where_there_are_none(partition_config):
    with pytest.raises(UserError, match=r"^federation.partition.kind=cluster goes by groups that are not known here; use another kind$"):
        partition(_train([0] * 9), partition_config(kind="cluster"), _names(3), 0)
