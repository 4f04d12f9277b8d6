"""``fedsb node check``: what the operator of a node has said, tried before anything is connected."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedsb.commands.flags import without_flags
from fedsb.core.errors import UserError
from fedsb.core.logs import log_to_screen


def node(arguments: Sequence[str]) -> int:
    """Try a ``node.yaml``, and print what was found.

    Raises:
        UserError: no ``check``, no file, or the first thing that would not do.
    """
    given = without_flags("node", arguments)
    if given[:1] != ["check"] or len(given) < 2:
        raise UserError("fedsb node takes what to do, and the file of a node: fedsb node check /etc/fedsb/node.yaml")
    from fedsb.app.node_check import checked

    log_to_screen()
    for line in checked(Path(given[1]), given[2:]):
        print(line, flush=True)
    return 0
