"""What a message asks for: the configuration of its run, and whether its node has an operator."""

from __future__ import annotations

from copy import copy
from functools import lru_cache
from pathlib import Path
from socket import gethostname

from flwr.app import ConfigRecord, Context, Message

from fedsb.app.anchoring import anchored
from fedsb.app.assembly import peopled
from fedsb.config.compose import load, split_overrides
from fedsb.config.schema import Config
from fedsb.core.errors import UserError
from fedsb.node.own_part import with_own
from fedsb.node.reading import is_operated, read_node
from fedsb.run.resuming import resumed
from fedsb.runtime.fab import launch_folder


@lru_cache(maxsize=8)
def config_of(overrides: str, *, real: bool = False) -> Config:
    """Return the configuration that a message's run has, composed once.

    Raises:
        UserError: the folder of a resumed run is not there.
    """
    given = split_overrides(overrides)
    config = anchored(load(given), launch_folder())
    if not real:
        config = peopled(config)
    elif not config.federation.num_clients:
        raise UserError("federation.partition.kind=natural is for simulations; name the clients: federation.names=[…]")
    if config.resume is None or Path(config.resume).is_dir():
        return resumed(config, given)
    # What the overrides alone leave out would be a default: a real node is told those that the run was begun with.
    raise UserError(f"resume={config.resume}: that folder is not there on {gethostname()}; share it with every machine of the run")


def config_in(context: Context) -> Config:
    """Return the configuration of a message's run, on a real node with what is the node's own.

    Raises:
        NodeConfigError: the node's own configuration cannot be used.
        UserError: see :func:`config_of`.
    """
    node = read_node(context.node_config)
    return asked_in(context) if node is None else with_own(asked_in(context), node)


def asked_in(context: Context) -> Config:
    """Return the configuration of a message's run as the server gives it.

    Raises:
        UserError: see :func:`config_of`.
    """
    return config_of(str(context.run_config["overrides"]), real=is_real(context))


def as_told(message: Message, context: Context) -> Context:
    """Return the context with the overrides that come with a message of a resumed run: a real node does not see that run's folder."""
    told = (message.content.config_records.get("config") or ConfigRecord()).get("overrides")
    if told is None or not is_real(context):
        return context
    changed = copy(context)
    changed.run_config = {**context.run_config, "overrides": str(told)}
    return changed


def is_real(context: Context) -> bool:
    """Tell whether the node has an operator: one of a real federation, and no simulated one."""
    return is_operated(context.node_config)
