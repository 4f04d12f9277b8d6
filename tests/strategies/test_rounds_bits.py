"""Neither the order of replies, nor the nodes, nor an earlier run in the process change a bit of a federation."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from flwr.app import Message

from tests.strategies.federations import ClientCall, KeepingGrid, federate
from tests.strategies.rounds import METHODS, Options, Plain


def test_the_largest_client_is_asked_first(options: Options) -> None:
    """In the start as in every round: what takes longest must not begin last. Ties go by name."""
    start = ("init.kind=gradient", "init.num_examples=2", "federation.fraction=1.0", "federation.num_rounds=2")
    federation = federate(options("tiny_bert", "fed_sb", *start, "federation.partition.sizes=[2,5,3,5,4]"))
    order = [("client-1", 23), ("client-3", 23), ("client-4", 18), ("client-2", 13), ("client-0", 9)]
    asked = [(exchange.instruction.client, exchange.answer.num_examples) for exchange in federation.grid.exchanges]
    pushes = len(asked) // len(order)
    assert {exchange.kind for exchange in federation.grid.exchanges} >= {"train", "train.evidence"}
    assert asked == order * pushes
    assert pushes > 3


def scrambled(seed: int) -> Callable[[ClientCall, dict[str, Any]], KeepingGrid]:
    """Return a maker of grids whose replies are late and come in a random order."""
    return lambda app, run_config: LateGrid(app, run_config, {i + 1: {"partition-id": i, "num-partitions": 3} for i in range(3)}, seed)


class LateGrid(KeepingGrid):
    """Answers everything at once, and hands the replies out later: none, one or several at a time, in a random order."""

    def __init__(self, app: ClientCall, run_config: dict[str, Any], nodes: dict[int, dict[str, Any]], seed: int) -> None:
        super().__init__(app, run_config, nodes)
        self._draw = random.Random(seed)
        self._waiting: list[Message] = []
        self.handed: list[Message] = []

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        wanted = list(message_ids)
        while replies := super().pull_messages(wanted):
            self._waiting += replies
        self._draw.shuffle(self._waiting)
        count = self._draw.randint(0, len(self._waiting))
        handed, self._waiting = self._waiting[:count], self._waiting[count:]
        self.handed += handed
        return handed


@pytest.mark.parametrize("method", METHODS)
def test_neither_arrival_nor_nodes_nor_an_earlier_run_change_a_bit(options: Options, plain: Plain, method: str) -> None:
    """One node in order; then, in the process and the model of that run, three nodes whose replies come late and shuffled."""
    in_order, late = plain("tiny_bert", method), federate(options("tiny_bert", method), grid=scrambled(seed=1))
    assert late.sha256 == in_order.sha256
    assert {e.node for e in late.grid.exchanges} == {1, 2, 3}
    assert isinstance(late.grid, LateGrid)
    assert late.grid.handed != [e.reply for e in late.grid.exchanges]
    assert [r.clients for r in late.records] == [r.clients for r in in_order.records]
    assert [r.metrics for r in late.records] == [r.metrics for r in in_order.records]


def test_dropout_and_another_seed_change_the_bits(options: Options, plain: Plain) -> None:
    dropout, seed = (federate(options("tiny_bert", "fed_sb", *more)) for more in (["adapter.dropout=0.1"], ["seed=1"]))
    assert len({plain("tiny_bert", "fed_sb").sha256, dropout.sha256, seed.sha256}) == 3


def test_a_gradient_start_does_not_see_an_earlier_run_in_its_process(options: Options) -> None:
    overrides = options("tiny_bert", "fed_sb", "init.kind=gradient", "init.num_examples=8", "federation.num_rounds=1")
    assert federate(overrides).sha256 == federate(overrides).sha256
