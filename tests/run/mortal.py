"""What the laws of resumed runs share: a grid that ends its run after so many replies, and runs of every kind to end so."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Message

from fedsb.runtime.local import LocalGrid
from tests.strategies.federations import FEDERATED_METHODS
from tests.strategies.private_runs import CLIENT, EXAMPLE

RUNS = {
    "fed_sb": ("init.kind=gradient", "init.num_examples=8", "init.power_iterations=0"),
    "fedex_lora": ("method=fedex_lora", "federation.fraction=0.75"),
    "adam": (
        "method=fedavg_lora",
        "federation.server_optimizer.name=adam",
        "federation.server_optimizer.lr=0.1",
        "federation.wire_dtype=int8",
    ),
    "momentum": ("init.kind=random", "federation.server_optimizer.name=momentum", "federation.wire_dtype=bfloat16"),
    "fedau": (
        "method=ffa_lora",
        "federation.weighting=fedau",
        "federation.fraction=0.5",
        "federation.cutoff=2",
        "federation.wire_dtype=int8",
    ),
    "private examples": (*EXAMPLE, "privacy.clipping=adaptive", "init.kind=weight_svd"),
    "private clients": (
        *CLIENT,
        "privacy.clipping=adaptive",
        "privacy.quantile_lr=0.5",
        "init.kind=orthogonal",
        "federation.wire_dtype=int8",
    ),
}
RUNS |= {method: (f"method={method}",) for method in FEDERATED_METHODS if method not in RUNS}
RUNS["private in turns"] = ("method=rolora", *EXAMPLE, "federation.wire_dtype=int8")
RUNS["lower ranks"] = (
    "method=hetlora",
    "method.options.prune=0.5",
    "train.tail_penalty=50",
    "train.lr=0.002",
    "init.kind=gradient",
    "init.num_examples=8",
    "adapter.options.gamma=1",
    "federation.wire_dtype=int8",
)
RUNS["two ranks"] = ("method=flexlora", "federation.ranks=[1,2]")
Run = Callable[..., dict[str, Any]]


class Killed(BaseException):
    """Ends a process at once, as far as a process can do that to itself."""


class Mortal(LocalGrid):
    """Ends the run when it has pulled so many replies, the last one after or before it was computed."""

    life, after = 10**9, False

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.life -= 1
        if self.life < 0 and not self.after:
            raise Killed
        replies = super().pull_messages(message_ids)
        if self.life < 0:
            raise Killed
        return replies
