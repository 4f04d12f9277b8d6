"""A server that tells clients of a secure sum different things, or what they know better, through the real ClientApp."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message

from fedsb.client_app import app as client_app
from fedsb.core.errors import RunError
from fedsb.core.folders import home
from tests.strategies.federations import ClientCall, federate
from tests.strategies.rounds import Options
from tests.strategies.test_secure_sum import ALL, SECURE


def added(told: Any, arrays: ArrayRecord) -> ArrayRecord:
    """Add to a bundle what sets a frozen weight to zero: behind it no example has a gradient that tells of it."""
    layout = json.loads(told["bundle"])
    [(module, _), (_, m)], [(_, _), (n, _)] = (next(each for each in layout if each[0][1].startswith(role)) for role in "AB")
    told["bundle"] = json.dumps([*layout, [[module, "D@1"], [n, m]]])
    return ArrayRecord({**arrays, "frozen": Array(np.concatenate([arrays["frozen"].numpy(), np.full(n * m, -0.5, np.float32)]))})


def telling(client: str, key: str, change: Callable[[Any], Any]) -> ClientCall:
    """Return the ClientApp behind a server that tells one client something else of the round; each client has a disk of its own."""
    homes = home()

    def call(message: Message, context: Context) -> Message:
        told = message.content["config"]
        if message.metadata.message_type == "train" and told["client"] == client:
            if key == "added":  # whatever it is called: the head of the log stays the same
                message.content["arrays"] = added(told, message.content["arrays"])
            elif key in ("weights", "bound"):
                told[key] = change(told[key])
            else:
                arrays = message.content["arrays"]
                message.content["arrays"] = ArrayRecord({**arrays, key: Array(np.array(change(arrays[key].numpy()), np.float32))})
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FEDSB_HOME", str(homes / str(told.get("client", "all"))))
            return client_app(message, context)

    return call


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("weights", lambda weights: [weights[0], *(0.0 for _ in weights[1:])]),
        ("trained", lambda values: values + 1),
        ("frozen", lambda values: 0 * values),
        ("added", None),
        ("bound", lambda bound: 2 * bound),
    ],
    ids=[
        "that the others weigh nothing",
        "another model to train from",
        "factors by which it learns nothing",
        "another frozen weight",
        "another bound",
    ],
)
def test_a_client_that_is_told_otherwise_is_in_no_sum(key: str, change: Callable[[Any], Any], options: Options) -> None:
    """A sum to which the others' parts are known would be the upload of the one."""
    apart = telling("client-0", key, change)
    with pytest.raises(RunError, match="round 1: the sum can't be unmasked: the clients were not told the same of the round"):
        federate(options("tiny_bert", "fed_sb", *SECURE, *ALL), app=apart)


def test_a_client_takes_no_weight_but_its_own(options: Options) -> None:
    lying = telling("client-0", "weights", lambda weights: [1e6, *weights[1:]])
    federation = federate(options("tiny_bert", "fed_sb", *SECURE, *ALL), app=lying)
    assert re.search(r"the server gives 'client-0' another weight than \d+, which is its own", federation.records[1].failed["client-0"])


def test_a_client_goes_on_from_what_has_counted_and_not_from_the_start(options: Options, caplog: pytest.LogCaptureFixture) -> None:
    """Who begins anew in a factor of its own moves little of what it uploads: where all but one do, the sum is nearly that one's upload."""

    def call(message: Message, context: Context) -> Message:
        told = message.content["config"]
        if message.metadata.message_type == "train" and told["round"] == 2 and told["client"] != "client-0":
            told.pop("own")
        return client_app(message, context)

    two = (*ALL, "federation.num_rounds=2")
    with pytest.raises(RunError, match="round 2: 1 of 5 clients sent an upload"):
        federate(options("tiny_bert", "fedsa_lora", *SECURE, *two), app=call)
    assert caplog.text.count("from what it kept in round 0, and it was in the sum of round 1") == 4


@pytest.mark.parametrize(("size", "stopped"), [(100, True), (2, False)])
def test_a_client_of_one_step_is_in_no_sum_where_it_keeps_a_factor(size: int, stopped: bool, options: Options) -> None:
    steps = ("train.local_steps=null", "train.local_epochs=1", f"train.batch_size={size}")
    with pytest.raises(RunError, match="examples are one step a round") if stopped else nullcontext():
        federate(options("tiny_bert", "fedsa_lora", *SECURE, *ALL, *steps))
