"""What a message asks for: the configuration of its run, and whether its node has an operator."""

from __future__ import annotations

from copy import copy
from functools import lru_cache
from pathlib import Path
from socket import gethostname

from flwr.app import ConfigRecord, Context, Message

from fedsb.app.anchoring import anchored
from fedsb.app.assembly import peopled, run_folder
from fedsb.config.compose import load, split_overrides
from fedsb.config.foreign import check_foreign
from fedsb.config.schema import Config
from fedsb.core.errors import UserError
from fedsb.core.folders import home
from fedsb.node.own_part import with_own
from fedsb.node.reading import is_operated, read_node
from fedsb.privacy.naming import client_folder
from fedsb.run.resuming import resumed
from fedsb.runtime.fab import launch_folder


@lru_cache(maxsize=8)
def config_of(overrides: str, *, real: bool = False) -> Config:
    """Return the configuration that a message's run has, composed once.

    Raises:
        UserError: the folder of a resumed run is not there.
    """
    given = split_overrides(overrides)
    if real:
        check_foreign(given)
    config = anchored(load(given), launch_folder())
    if real and config.resume is not None:
        # A server that names a folder of the node's has no business there.
        raise UserError(f"resume={config.resume}: a real node doesn't see a run's folder; the server says what that run was begun with")
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
    return config_of(overrides_in(context), real=is_real(context))


def overrides_in(context: Context) -> str:
    """Return the overrides of a message's run."""
    return str(context.run_config["overrides"])


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


def folder_of_run(context: Context, config: Config) -> Path:
    """Return the folder of a simulated run."""
    given = context.run_config.get("output")
    return run_folder(config, str(context.run_id), None if given is None else str(given))


def own_folder(context: Context, config: Config, kind: str, origin: str, client: str) -> Path:
    """Return where a client keeps what is its own: in the run's folder in a simulation, in the node's own home, by the run, otherwise."""
    folder = home() / kind / origin if is_real(context) else folder_of_run(context, config) / kind
    return folder / client_folder(client)
