"""Answers of a node as its operator allows them: what is refused and why goes to its own log, and to the server a code."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

from flwr.app import Context, Message

from fedsb.app.asked import config_in, is_real
from fedsb.app.ledger_rows import readable_rows
from fedsb.app.private_run import reason_of
from fedsb.config.schema import Config
from fedsb.core.errors import UserError, is_fault
from fedsb.core.folders import home
from fedsb.core.logs import node_log
from fedsb.node.policy import NodePolicy, read_policy
from fedsb.node.refusals import code_of, key_of
from fedsb.privacy.account import LEDGERS, charge_unnoised
from fedsb.privacy.codes import BudgetExceeded, OwnStateLost
from fedsb.privacy.ledger import Key, Ledger
from fedsb.privacy.naming import name_of_data
from fedsb.privacy.rows import Hashes
from fedsb.privacy.shelf import Shelf
from fedsb.wire.frozen import FrozenMissing
from fedsb.wire.messages import encode_code, encode_missing

LOG = logging.getLogger(__name__)


def coded(message: Message, context: Context, answer: Callable[[], Message]) -> Message:
    """Answer, where the node's operator allows it; let a client say why it fails by a code alone, for a traceback's text can carry data.

    The text goes to the node's own log. A simulated client without privacy says it all.
    """
    with own_log(context):
        try:
            _admit(context)
            return answer()
        except FrozenMissing:
            return Message(encode_missing(), reply_to=message)
        except BaseException as error:
            if not is_fault(error):
                raise
            if not is_real(context) and config_in(context).privacy.unit == "none" and not isinstance(error, OwnStateLost):
                raise
            # Expected refusals are a line, faults of ours a traceback; neither leaves this machine.
            expected = isinstance(error, (BudgetExceeded, OwnStateLost, UserError))
            LOG.warning("%s: %s", _asked(message, context), error, exc_info=not expected)
            return Message(encode_code(code_of(error).number, key_of(error)), reply_to=message)


def own_log(context: Context) -> AbstractContextManager[None]:
    """Return what writes a real node's own log while a message is answered; a simulated client's lines go to the log of the run."""
    return node_log(home() / "node.log") if is_real(context) else nullcontext()


def _admit(context: Context) -> None:
    policy = read_policy(context.node_config)
    if policy is not None:
        config = config_in(context)
        policy.admit(config, unnoised=reason_of(config))


def _asked(message: Message, context: Context) -> str:
    """Say what was asked for in the words of an operator's log: run, round, client and the overrides, which come from the server."""
    told: Mapping[str, object] = message.content.config_records.get("config") or {}
    who, number = told.get("client") or context.node_config.get("client", ""), told.get("round", "-")
    return (
        f"no reply to '{message.metadata.message_type}' of run {context.run_id}, round {number!s}, client '{who!s}' "
        f"(overrides: {context.run_config.get('overrides', '')!s})"
    )


def leave_unnoised(context: Context, config: Config, labels: tuple[str, ...]) -> None:
    """Note in a real node's ledger, before its data are read, that what a run without example-level privacy is answered has no noise.

    A refusal is an answer too: whether all rows have one of the labels that the server names is said by a code. No later run on that data
    may claim an epsilon. Noted once a run.
    """
    policy = read_policy(context.node_config)
    if policy is None or config.privacy.unit == "example":
        return
    shelf = Shelf(home() / LEDGERS)
    rows = readable_rows(config, policy.client, policy.data_path, labels, shelf.salt)
    charge_unnoised(open_ledger(shelf, policy, rows), Key(str(context.run_id), 0, "answers", policy.client))


def open_ledger(shelf: Shelf, policy: NodePolicy, rows: Hashes) -> Ledger:
    """Return the ledger of a real node's data."""
    return shelf.open(name_of_data(policy.client, policy.data_path, policy.ledger), rows)


def data_path_of(context: Context, client: str) -> str | None:
    """Return the operator's own data path, or None in a simulation and where the data ship in a package.

    Raises:
        NodeConfigError: the node's own configuration cannot be used.
        UserError: the node serves another client than the one asked for.
    """
    policy = read_policy(context.node_config)
    if policy is None:
        return None
    if policy.client != client:
        raise UserError(f"this node serves '{policy.client}' and was asked for '{client}'")
    return policy.data_path
