"""Bytes of a Fed-SB reply over the bytes of its factors: as a RecordDict in protobuf, and as Flower's inflatable objects.

The reply is one that the ClientApp gave: 36 modules of MiniLM at rank 8, no head, one step of training.
"""

from __future__ import annotations

import shlex

from figures import Figure
from flwr.app import Context, Message, RecordDict
from flwr.common.serde import recorddict_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedsb.app.prepare import prepare
from fedsb.client_app import app
from fedsb.config.compose import load
from fedsb.runtime.local import LocalGrid
from fedsb.wire.arrays import encode_arrays
from fedsb.wire.byte_counts import payload_bytes

OVERRIDES = (
    *(
        "method=fed_sb",
        "rank=8",
        "model.head=none",
        "adapter.targets=[bert.encoder.*]",
        "init.kind=orthogonal",
        "device=cpu",
        "runtime.threads=1",
    ),
    *("federation.num_clients=2", "federation.num_rounds=1", "train.local_steps=1", "train.batch_size=2"),
)


def reply() -> RecordDict:
    """Run a round and return what a client answered in it."""
    contents: list[RecordDict] = []

    def noting(message: Message, context: Context) -> Message:
        answer = app(message, context)
        contents.append(answer.content)
        return answer

    prepared = prepare(load(OVERRIDES))
    grid = LocalGrid.simulation(noting, {"overrides": shlex.join(OVERRIDES)})
    prepared.strategy.start(grid, encode_arrays(prepared.initial), num_rounds=1)
    return contents[-1]


def figures(quick: bool) -> list[Figure]:
    """Count."""
    content = reply()
    factors = payload_bytes(content)
    assert factors == 36 * 8 * 8 * 4, f"{factors} bytes of factors"
    protobuf = recorddict_to_proto(content).ByteSize()
    objects = sum(len(item.deflate()) for item in get_all_nested_objects(content).values())
    return [
        Figure(f"Fed-SB reply, {factors} bytes of factors: protobuf over them", protobuf / factors, 1.06),
        Figure("  inflatable objects over them", objects / factors, 1.15),
    ]
