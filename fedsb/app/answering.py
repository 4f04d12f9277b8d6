"""Answers of a node as its operator allows them: what is refused and why goes to its own log, and to the server a code."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

from flwr.app import Context, Message

from fedsb.app.asked import asked_in, config_in, is_real
from fedsb.app.assembly import forget_data
from fedsb.app.frozen_stores import forget_stores
from fedsb.app.ledger_rows import forget_rows, readable_rows
from fedsb.app.private_run import reason_of
from fedsb.config.schema import Config
from fedsb.core.errors import UserError, is_fault
from fedsb.core.folders import home
from fedsb.core.logs import node_log, printable
from fedsb.models.build import forget_models
from fedsb.node.deadline import TimeOver, within
from fedsb.node.own_part import own_labels
from fedsb.node.policy import admit
from fedsb.node.reading import name_of, read_node
from fedsb.node.refusals import code_of, key_of
from fedsb.node.request import Request
from fedsb.node.settings import NodeConfig
from fedsb.privacy.account import LEDGERS, charge_unnoised
from fedsb.privacy.charges import Key
from fedsb.privacy.codes import BudgetExceeded, OwnStateLost
from fedsb.privacy.ledger import Ledger
from fedsb.privacy.naming import name_of_data
from fedsb.privacy.rows import Hashes
from fedsb.privacy.shelf import Shelf
from fedsb.wire.arrays import LayoutDiffers
from fedsb.wire.frozen import FrozenMissing
from fedsb.wire.messages import encode_code, encode_missing

LOG = logging.getLogger(__name__)


def coded(message: Message, context: Context, answer: Callable[[], Message]) -> Message:
    """Answer, where the node's operator allows it; let a client say why it fails by a code alone, for a traceback's text can carry data.

    The text goes to the node's own log. A simulated client without privacy says it all.
    """
    with own_log(context):
        try:
            node = read_node(context.node_config)
            with within(node.limits.max_seconds if node else None):
                hold(message, context)
                return answer()
        except FrozenMissing:
            return Message(encode_missing(), reply_to=message)
        except BaseException as error:
            if not is_fault(error) and not isinstance(error, (TimeOver, SystemExit)):  # a module that was not made to be imported exits
                raise
            if not is_real(context) and config_in(context).privacy.unit == "none" and not isinstance(error, OwnStateLost):
                raise
            # Expected refusals are a line, faults of ours a traceback; neither leaves this machine.
            expected = isinstance(error, (BudgetExceeded, LayoutDiffers, OwnStateLost, TimeOver, UserError))
            if isinstance(error, TimeOver) or not expected:
                forget()  # a model was in the midst of something
            LOG.warning("%s: %s", _asked(message, context), printable(str(error)), exc_info=not expected)
            return Message(encode_code(code_of(error).number, key_of(error)), reply_to=message)


def forget() -> None:
    """Forget what this process has made for its messages: models, tokens, and frozen parts."""
    forget_models()
    forget_data()
    forget_rows()
    forget_stores()


def own_log(context: Context) -> AbstractContextManager[None]:
    """Return what writes a real node's own log while a message is answered; a simulated client's lines go to the log of the run."""
    return node_log(home() / "node.log") if is_real(context) else nullcontext()


def hold(message: Message, context: Context, count: int | None = None) -> None:
    """Hold a message against what the node's operator allows; a simulated node has none.

    Args:
        message: says the labels.
        context: says the run's configuration, and the operator's.
        count: the client's training examples, once they are known.

    Raises:
        NodeConfigError: the node's own configuration cannot be used.
        PolicyError: the operator does not allow it.
    """
    node = read_node(context.node_config)
    if node is not None:
        config = asked_in(context)
        told: Mapping[str, object] = message.content.config_records.get("config") or {}
        labels = tuple(json.loads(str(told.get("labels", "[]"))))
        admit(node, Request(config, labels, reason_of(config), count, evaluation=message.metadata.message_type == "evaluate"))


def _asked(message: Message, context: Context) -> str:
    """Say what was asked for in the words of an operator's log: run, round, client and the overrides, which come from the server."""
    told: Mapping[str, object] = message.content.config_records.get("config") or {}
    who, number = told.get("client") or name_of(context.node_config), told.get("round", "-")
    return printable(
        f"no reply to '{message.metadata.message_type}' of run {context.run_id}, round {number!s:.20}, client '{who!s:.80}' "
        f"(overrides: {context.run_config.get('overrides', '')!s})"
    )


def leave_unnoised(context: Context, config: Config, labels: tuple[str, ...]) -> None:
    """Note in a real node's ledger, before its data are read, that what a run without example-level privacy is answered has no noise.

    A refusal is an answer too: whether all rows have one of the labels that the server names is said by a code. No later run on that data
    may claim an epsilon. Noted once a run.
    """
    node = read_node(context.node_config)
    if node is None or config.privacy.unit == "example":
        return
    shelf = Shelf(home() / LEDGERS)
    rows = readable_rows(config, node.client, node.data_path, own_labels(labels, node), shelf.salt)
    charge_unnoised(open_ledger(shelf, node, rows), Key(str(context.run_id), 0, "answers", node.client))


def open_ledger(shelf: Shelf, node: NodeConfig, rows: Hashes) -> Ledger:
    """Return the ledger of a real node's data."""
    return shelf.open(name_of_data(node.client, node.data_path, node.privacy.ledger), rows)


def data_path_of(context: Context, client: str) -> str | None:
    """Return the operator's own data path, or None in a simulation and where the data ship in a package.

    Raises:
        NodeConfigError: the node's own configuration cannot be used.
        UserError: the node serves another client than the one asked for.
    """
    node = read_node(context.node_config)
    if node is None:
        return None
    if node.client != client:
        raise UserError(f"this node serves '{node.client}' and was asked for '{client}'")
    return node.data_path
