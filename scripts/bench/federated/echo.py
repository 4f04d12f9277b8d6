"""A Flower app of its own: the server sends flat arrays to all nodes at once, and they come back; a line a round goes to a file.

It is copied into a folder and submitted, so that it imports Flower and NumPy alone.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

server = ServerApp()
client = ClientApp()
LOOKS_S = (0.02, 0.5)  # between two looks for replies: first, and at most, as fedsb's server looks


def looked_for(grid: Grid, messages: Sequence[Message]) -> list[Message]:
    """Return the replies to all messages, which are there soon after they have come."""
    wanted, replies, pause = set(grid.push_messages(messages)), list[Message](), LOOKS_S[0]
    while wanted:
        arrived = list(grid.pull_messages(list(wanted)))
        replies += arrived
        wanted -= {reply.metadata.reply_to_message_id for reply in arrived}
        time.sleep(pause if wanted else 0.0)
        pause = LOOKS_S[0] if arrived else min(2 * pause, LOOKS_S[1])
    return replies


def slept_for(grid: Grid, messages: Sequence[Message]) -> list[Message]:
    """Return the replies as Flower's own strategies wait for them, who sleep three seconds between two looks."""
    return list(grid.send_and_receive(messages))


WAITS: dict[str, Callable[[Grid, Sequence[Message]], list[Message]]] = {"looking": looked_for, "sleeping": slept_for}


def awaited(grid: Grid, count: int) -> list[int]:
    """Return the nodes when so many are there."""
    while len(nodes := list(grid.get_node_ids())) < count:
        time.sleep(LOOKS_S[0])
    return nodes


@client.train()
def echo(message: Message, context: Context) -> Message:
    """Return what came."""
    return Message(message.content, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Send so many rounds of so many float32 values to so many nodes; none: an empty record."""
    said = dict(each.split("=", 1) for each in shlex.split(str(context.run_config["overrides"])))
    values = np.zeros(int(said["values"]), np.float32)
    nodes = awaited(grid, int(said["nodes"]))
    for number in range(int(said["rounds"]) + 1):  # the first is not counted: nodes fetch the app
        begun = time.monotonic()
        content = RecordDict({"arrays": ArrayRecord([values]) if values.size else ArrayRecord(), "config": ConfigRecord({"round": number})})
        replies = WAITS[said["wait"]](grid, [Message(content, node, "train") for node in nodes])
        if len(replies) != len(nodes) or any(reply.has_error() for reply in replies):
            raise RuntimeError(f"round {number}: {len(replies)} replies of {len(nodes)} nodes")
        with Path(said["out"]).open("a", encoding="utf-8") as out:
            out.write(json.dumps({"round": number, "wall_s": time.monotonic() - begun}) + "\n")
