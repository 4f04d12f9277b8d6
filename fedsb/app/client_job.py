"""One instruction to a client with everything it needs: configuration, model, data, frozen part, account and random streams."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import cache, cached_property, lru_cache
from pathlib import Path
from socket import gethostname

from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedsb.app.assembly import anchored, client_features, model_of, peopled, run_folder, task_of, use_threads
from fedsb.app.ledger_rows import rows_of
from fedsb.app.own_factors import fresh_factors, own_start
from fedsb.app.private_run import add_plan, plan_of, reason_of, saved_plan
from fedsb.config.compose import as_dict, load, split_overrides
from fedsb.config.derived import ranks_of
from fedsb.config.schema import Config
from fedsb.core.errors import RunError, UserError
from fedsb.core.folders import home
from fedsb.core.logs import node_log
from fedsb.core.state import State, non_finite
from fedsb.models.fit import FitResult, Site
from fedsb.node.policy import NodePolicy, is_operated, read_policy
from fedsb.node.refusals import code_of, key_of
from fedsb.privacy.account import LEDGERS, Account, allowed, charge_unnoised
from fedsb.privacy.codes import BudgetExceeded, OwnStateLost
from fedsb.privacy.ledger import SIMULATION, Key, Ledger
from fedsb.privacy.naming import client_folder, name_of_data
from fedsb.privacy.plan import Plan
from fedsb.privacy.randomness import Streams, secret_streams, simulated_streams
from fedsb.privacy.rows import Hashes, hash_rows
from fedsb.privacy.shelf import Shelf
from fedsb.run.own_state import OwnState
from fedsb.run.resuming import fingerprint, resumed
from fedsb.runtime.fab import launch_folder
from fedsb.wire.frozen import FrozenMissing, FrozenView
from fedsb.wire.frozen_cache import FrozenCache
from fedsb.wire.messages import Instruction, decode_instruction, encode_code, encode_missing, encode_reply

LOG = logging.getLogger(__name__)
OWN = "own"  # folder of what clients keep for themselves


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
    """Return the configuration of a message's run.

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


@cache
def _store(folder: Path, rank: int | None) -> FrozenCache:
    return FrozenCache(folder, rank)


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
        except Exception as error:
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


class Job:
    """One instruction with everything it needs."""

    def __init__(self, message: Message, context: Context) -> None:
        self._context = context
        self.config = config_in(context)
        use_threads(self.config)
        self.instruction: Instruction = decode_instruction(message.content)
        self.policy = read_policy(context.node_config)
        self.real = self.policy is not None
        self.data_path = data_path_of(context, self.instruction.client)
        leave_unnoised(context, self.config, self.instruction.labels)
        self.task = task_of(self.config)
        self.adapted = model_of(self.config, self.instruction.labels)
        self.train, self.held_out = client_features(self.config, self.instruction.client, self.data_path, self.instruction.labels)

    def frozen(self) -> FrozenView:
        """Take in what came with the instruction and return the frozen part it is based on."""
        i = self.instruction
        rank = self.rank if self.adapted.spec.in_log else None
        return _store(home() / "frozen", rank).take(i.bundle, i.frozen, i.origin, back=self.config.keep_checkpoints)

    def sent_down(self) -> State:
        """Return the state that the server sent."""
        return self.instruction.state(self.adapted.layouts.at(self.rank).down)

    @property
    def rank(self) -> int | None:
        """The client's own rank, as its node or the run says; None: that of the model."""
        return (self.policy.rank if self.policy else None) or ranks_of(self.config).get(self.instruction.client)

    def own(self) -> State:
        """Return what the client brings itself: factors that it keeps, and those that begin anew in this round."""
        fresh, counted = fresh_factors(self.config, self.adapted, self.instruction.round, self.rank), self.instruction.own
        if not self.adapted.spec.own:
            return fresh
        return fresh.merge(self._own_state.of(counted) if counted else own_start(self.config, self.adapted, self.rank))

    def state(self) -> State:
        """Return what the client starts from, but for what it holds from the log."""
        return self.sent_down().merge(self.own())

    def keep_own(self, trained: State) -> None:
        """Keep what of the trained factors is the client's own.

        Raises:
            RunError: it is not finite, and would never be again: nothing is uploaded, and the client goes on from what it kept before.
        """
        own = trained.pick(*self.adapted.spec.own)
        if broken := non_finite(own):
            raise RunError(f"{broken.role} of '{broken.module}', which the client keeps for itself, holds NaN or infinity; lower train.lr")
        if len(own):
            self._own_state.save(self.instruction.round, own, since=self.instruction.own)

    @cached_property
    def _own_state(self) -> OwnState:
        """In the run's folder in a simulation, in the node's own home, by the run, otherwise."""
        folder = home() / OWN / self.instruction.origin if self.real else self._run_folder() / OWN
        return OwnState(folder / client_folder(self.instruction.client), self.config.keep_checkpoints)

    def site(self) -> Site:
        """Name the streams of this client and round."""
        i, c = self.instruction, self.config
        return Site(c.seed, i.client, i.round, c.federation.num_rounds)

    @cached_property
    def ledger(self) -> Ledger:
        """The client's ledger: in the run's folder in a simulation, and in the node's own home, named after the data, otherwise."""
        client = self.instruction.client
        if self.policy is not None:
            shelf = Shelf(home() / LEDGERS)
            return _opened(shelf, self.policy, rows_of(self.config, client, self.data_path, self.instruction.labels, shelf.salt))
        privacy = self.config.privacy
        header = {"unit": privacy.unit, "client": client, "privacy": as_dict(privacy), "run": fingerprint(self.config)}
        return Ledger(self._run_folder() / LEDGERS / client_folder(client), header)

    @cached_property
    def account(self) -> Account:
        """The client's plan in this run, and its ledger."""
        privacy, run = self.config.privacy, str(self._context.run_id)
        most, name = privacy.max_epsilon, self.instruction.client
        if self.real:
            plan = self._plan(self.ledger.folder, f"{run}/{name}")
            own = self.policy.limit(plan.delta) if self.policy else None
            return Account(self.ledger, plan, privacy.accountant, most, run, client=name, own=own)
        return Account(self.ledger, self._plan(self._run_folder() / LEDGERS, name), privacy.accountant, most, SIMULATION, repeatable=True)

    def _run_folder(self) -> Path:
        given = self._context.run_config.get("output")
        return run_folder(self.config, str(self._context.run_id), None if given is None else str(given))

    def _plan(self, folder: Path, name: str) -> Plan:
        """Return the plan that lies in ``folder``; a message may have a process of its own, and calibrating takes seconds."""
        client, count = self.instruction.client, len(self.train)
        plan = saved_plan(folder, name)
        if plan is None or plan.num_examples != count:
            plan = plan_of(self.config, client, count)
            if self.real:
                add_plan(folder, name, plan)
        if self.policy is not None:
            self.policy.admit_noise(plan.training.noise_multiplier, plan.start.noise_multiplier if plan.start else None)
        return plan

    def streams(self, exchange: str) -> Streams:
        """Return the generators of noise and samples: nobody but a real node may be able to repeat them."""
        if self.real:
            return secret_streams(self.adapted.device)
        i = self.instruction
        return simulated_streams(self.config.seed, i.client, i.round, exchange, self.adapted.device)

    def plain_reply(self, trained: State, result: FitResult, frozen: FrozenView) -> RecordDict:
        """Return the content of the reply to a round that has no privacy, and keep what is the client's own."""
        wire = self.config.federation.wire_dtype
        upload, told = self.adapted.upload(trained, self.instruction.round, frozen.basis, wire)
        self.keep_own(trained)
        return encode_reply(upload, len(self.train), {"loss": result.loss, "steps": result.steps, **told}, wire)

    def private_reply(self, upload: State, metrics: Mapping[str, float]) -> RecordDict:
        """Return the content of the reply to a private round: nothing beside the account."""
        return encode_reply(upload, len(self.train), allowed(metrics), self.config.federation.wire_dtype)


def leave_unnoised(context: Context, config: Config, labels: tuple[str, ...]) -> None:
    """Note in a real node's ledger, before its data are read, that what a run without example-level privacy is answered has no noise.

    A refusal is an answer too: whether all rows have one of the labels that the server names is said by a code. No later run on that data
    may claim an epsilon. Noted once a run.
    """
    policy = read_policy(context.node_config)
    if policy is None or config.privacy.unit == "example":
        return
    shelf = Shelf(home() / LEDGERS)
    try:
        rows = rows_of(config, policy.client, policy.data_path, labels, shelf.salt)
    except Exception:  # what is wrong with them is told by who reads them next, and the ledger is that of their place all the same
        rows = hash_rows((), None, shelf.salt)
    charge_unnoised(_opened(shelf, policy, rows), Key(str(context.run_id), 0, "answers", policy.client))


def _opened(shelf: Shelf, policy: NodePolicy, rows: Hashes) -> Ledger:
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
