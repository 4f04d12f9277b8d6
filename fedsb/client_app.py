"""The Flower ClientApp that the server ships: it answers a message itself, or takes it to the worker that the node's operator runs.

With a worker the process that Flower starts for a message imports neither torch nor transformers, and is one that need not be trusted.
"""

# ruff: noqa: E402 -- the submitted code must come first on the import path before any of it is imported
from __future__ import annotations

from fedsb.runtime.fab import prefer_submitted_code

prefer_submitted_code()

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsb.core.collector import uncollected
from fedsb.resident.place import WORKER
from fedsb.resident.relay import mismatched, relayed


class Answering(ClientApp):
    """Answers messages of every kind that there is."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Return the reply: the worker's where ``--node-config`` names one."""
        if (reply := mismatched(message)) is not None:
            return reply
        if WORKER in context.node_config:
            return relayed(message, context)
        with uncollected(for_good=True):
            from fedsb.app.answers import app as answering
        return answering(message, context)


app = Answering()
