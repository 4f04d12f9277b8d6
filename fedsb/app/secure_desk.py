"""The desk at which a message of a secure sum is answered: what of the message's run it needs, and where its client keeps its part."""

from __future__ import annotations

from flwr.app import Context

from fedsb.app.asked import asked_in, overrides_in, own_folder
from fedsb.app.secured import FOLDER, Desk
from fedsb.node.reading import read_node
from fedsb.wire.messages import Instruction


def desk_for(context: Context, instruction: Instruction) -> Desk:
    """Return the desk of a message.

    It knows the run's configuration as the server gives it, without what is each node's own, so that all clients can hold it against
    each other's.

    Raises:
        SecureError: the run has no secure sums, or the message is of none.
    """
    asked = asked_in(context)
    folder = own_folder(context, asked, FOLDER, instruction.origin, instruction.client)
    return Desk(asked, instruction, folder, read_node(context.node_config), overrides_in(context))
