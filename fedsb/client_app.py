"""The Flower ClientApp: reads an instruction, composes the configuration, hands the work to ``clients/``, encodes the reply."""

# ruff: noqa: E402 -- the submitted code must come first on the import path before any of it is imported
from __future__ import annotations

from fedsb.runtime.fab import launch_folder, prefer_submitted_code

prefer_submitted_code()

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache, cached_property, lru_cache, wraps
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients import draw_evidence, evaluate_round, give_evidence, train_round
from clients.faults import drawn, suffer
from fedsb.adapters.starts import Sketch
from fedsb.assembly import anchored, client_examples, client_features, home, model_of, run_folder, task_of, use_threads
from fedsb.config import as_dict, load, split_overrides
from fedsb.errors import UserError
from fedsb.exactness import encoding_error
from fedsb.frozen import Frozen, FrozenMissing, FrozenStore
from fedsb.messages import Instruction, decode_instruction, encode_code, encode_missing, encode_reply, quantise
from fedsb.privacy.account import LEDGERS, Account, allowed, ledger_folder
from fedsb.privacy.codes import BudgetExceeded, code_of
from fedsb.privacy.ledger import Ledger
from fedsb.privacy.plan import Plan, unnoised_start
from fedsb.privacy.randomness import Streams, secret_streams, simulated_streams
from fedsb.private_run import plan_of, save_plans, saved_plan
from fedsb.resuming import resumed
from fedsb.rules import FAULTS, start_kind
from fedsb.schema import Config
from fedsb.sketching import probe_layout, sketch_of
from fedsb.state import State
from fedsb.training import Site

app = ClientApp()
LOG = logging.getLogger(__name__)
Handler = Callable[[Message, Context], Message]


@lru_cache(maxsize=8)
def _config(overrides: str) -> Config:
    given = split_overrides(overrides)
    config = anchored(load(given), launch_folder())
    if config.resume is not None and not Path(config.resume).is_dir():
        # A real node: the server has held the overrides against the run.
        return replace(config, resume=None)
    return resumed(config, given)


@cache
def _store(folder: Path) -> FrozenStore:
    return FrozenStore(folder)


def _codes_only(handler: Handler) -> Handler:
    """Let clients of a private run say why they fail by a code alone: a traceback's text can carry data. The text goes to their own log."""

    @wraps(handler)
    def guarded(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except FrozenMissing:
            return Message(encode_missing(), reply_to=message)
        except Exception as error:
            if _config(str(context.run_config["overrides"])).privacy.unit == "none":
                raise
            # Expected refusals are a line, faults of ours a traceback; neither leaves this machine.
            expected = isinstance(error, (BudgetExceeded, UserError))
            LOG.warning("no reply to %s: %s", message.metadata.message_type, error, exc_info=not expected)
            return Message(encode_code(code_of(error).number), reply_to=message)

    return guarded


def _faulty(handler: Handler) -> Handler:
    """Let simulated clients suffer what ``faults`` asks for; those of a real federation have enough of their own."""

    @wraps(handler)
    def suffering(message: Message, context: Context) -> Message:
        config = _config(str(context.run_config["overrides"]))
        if not any(getattr(config.faults, kind) for kind in FAULTS):
            return handler(message, context)
        if context.node_config.get("client"):
            raise UserError("faults are for simulations; leave faults=… out in a real federation")
        told = message.content.config_records["config"]
        faults = drawn(config.faults, seed=config.seed, client=str(told["client"]), round_number=int(told["round"]))  # type: ignore[arg-type]
        return suffer(faults, lambda: handler(message, context))

    return suffering


class _Job:
    """One instruction with everything it needs."""

    def __init__(self, message: Message, context: Context) -> None:
        self._context = context
        self.config = _config(str(context.run_config["overrides"]))
        use_threads(self.config)
        self.instruction: Instruction = decode_instruction(message.content)
        self.real = bool(context.node_config.get("client"))
        self.data_path = _data_path(context, self.instruction.client)
        self.task = task_of(self.config)
        self.adapted = model_of(self.config, self.instruction.labels)
        self.train, self.held_out = client_features(self.config, self.instruction.client, self.data_path, self.instruction.labels)

    def frozen(self) -> Frozen:
        """Take in what came with the instruction and return the frozen part it is based on."""
        store = _store(home() / "frozen")
        if self.instruction.bundle is not None:
            store.receive(self.instruction.bundle)
        return store.load(self.instruction.frozen)

    def state(self) -> State:
        """Return the trained state that the server sent."""
        return self.instruction.state(self.adapted.layout)

    def site(self) -> Site:
        """Name the streams of this client and round."""
        i, c = self.instruction, self.config
        return Site(c.seed, i.client, i.round, c.federation.num_rounds)

    @cached_property
    def account(self) -> Account:
        """The client's plan in this run and its ledger: in the run's folder in a simulation, in the node's own home otherwise."""
        privacy, client = self.config.privacy, self.instruction.client
        given, run = self._context.run_config.get("output"), str(self._context.run_id)
        parent = home() if self.real else run_folder(self.config, run, None if given is None else str(given))
        folder = ledger_folder(parent / LEDGERS, client, self.data_path)
        header = {"unit": privacy.unit} | ({} if self.real else {"client": client, "privacy": as_dict(privacy)})
        ledger = Ledger(folder, header)
        plan = self._plan(folder if self.real else parent / LEDGERS, run)
        # A resumed simulation has another run id and the same ledgers: what they kept is found by the same key.
        return Account(ledger, plan, privacy.accountant, privacy.max_epsilon, run if self.real else "simulation", not self.real)

    def _plan(self, folder: Path, run: str) -> Plan:
        """Return the plan that lies in ``folder``, a real node's under its run: a message may have a process of its own."""
        client, count = self.instruction.client, len(self.train)
        name = run if self.real else client
        plan = saved_plan(folder, name)
        if plan is None or plan.num_examples != count:
            plan = plan_of(self.config, client, count)
            if self.real:
                save_plans(folder, {name: plan})
        return plan

    def streams(self, exchange: str) -> Streams:
        """Return the generators of noise and samples: nobody but a real node may be able to repeat them."""
        if self.real:
            return secret_streams(self.adapted.device)
        i = self.instruction
        return simulated_streams(self.config.seed, i.client, i.round, exchange, self.adapted.device)


def _data_path(context: Context, client: str) -> str | None:
    """Return the operator's own data path, or None in a simulation.

    Raises:
        UserError: the node serves another client than the one asked for.
    """
    own = str(context.node_config.get("client", ""))
    if own and own != client:
        raise UserError(f"this node serves '{own}' and was asked for '{client}'")
    path = context.node_config.get("data-path")
    if path and not own:
        raise UserError('this node has a data-path but no client; start it with --node-config \'client="…" data-path="…"\'')
    return str(path) if path else None


@app.query("describe")
@_codes_only
def describe(message: Message, context: Context) -> Message:
    """Say whom this node serves, and how many training examples each of the clients asked for has."""
    config = _config(str(context.run_config["overrides"]))
    request = message.content.config_records["config"]
    labels = tuple(json.loads(str(request["labels"])))
    own = str(context.node_config.get("client", ""))
    names = [own] if own else json.loads(str(request["clients"]))
    counts = [len(client_examples(config, name, _data_path(context, name), labels)[0]) for name in names]
    content = {
        "config": ConfigRecord({"client": own, "counted": json.dumps(names)}),
        "metrics": MetricRecord({"num-examples": counts}),
    }
    return Message(RecordDict(content), reply_to=message)  # type: ignore[arg-type]


@app.train()
@_codes_only
@_faulty
def train(message: Message, context: Context) -> Message:
    """Train one round and upload the factors and the head."""
    job = _Job(message, context)
    if job.config.privacy.unit == "example":
        return Message(_train_privately(job), reply_to=message)
    frozen = job.frozen()
    upload, result = train_round(
        job.adapted, job.task, job.train, state=job.state(), frozen=frozen, train=job.config.train, site=job.site()
    )
    metrics = {"loss": result.loss, "steps": result.steps}
    wire = job.config.federation.wire_dtype
    if wire != "float32":
        metrics["encoding-error"] = encoding_error(upload, quantise(upload, wire), job.adapted.spec, job.adapted.scale, frozen.basis)
    return Message(encode_reply(upload, len(job.train), metrics, wire), reply_to=message)


def _train_privately(job: _Job) -> RecordDict:
    # Opacus takes seconds to import, and most processes never need it.
    from clients.private_work import private_round

    config = job.config
    answer = private_round(
        job.adapted,
        job.task,
        job.train,
        state=job.state(),
        frozen=job.frozen,
        train=config.train,
        privacy=config.privacy,
        site=job.site(),
        account=job.account,
        streams=job.streams("train"),
        wire_dtype=config.federation.wire_dtype,
    )
    return encode_reply(answer.state, len(job.train), allowed(answer.metrics), config.federation.wire_dtype)


@app.train("evidence")
@_codes_only
def evidence(message: Message, context: Context) -> Message:
    """Give one exchange of the gradient sketch."""
    job = _Job(message, context)
    config, instruction = job.config, job.instruction
    sketch: Sketch = sketch_of(config.init, config.adapter.rank, config.seed)
    stage, _, number = instruction.stage.partition(".")
    probes = instruction.state(probe_layout(sketch, job.adapted.shapes, stage, first=not instruction.flats))
    job.adapted.reset()
    if config.privacy.unit == "example":
        if unnoised_start(config.privacy, start_kind(config), config.init.evidence) is None:
            return Message(_give_privately(job, sketch, stage, int(number), probes), reply_to=message)
        job.account.charge_unnoised(instruction.stage)
    examples = draw_evidence(job.train, config.init.num_examples, seed=config.seed, client=instruction.client)
    state = give_evidence(
        job.adapted,
        job.task,
        examples,
        sketch=sketch,
        stage=stage,
        probes=probes,
        micro_batch=config.init.micro_batch,
    )
    return Message(encode_reply(state, len(job.train), {}), reply_to=message)


def _give_privately(job: _Job, sketch: Sketch, stage: str, number: int, probes: State) -> RecordDict:
    from clients.private_work import private_evidence

    answer = private_evidence(
        job.adapted,
        job.task,
        job.train,
        sketch=sketch,
        stage=stage,
        number=number,
        probes=probes,
        privacy=job.config.privacy,
        micro_batch=job.config.init.micro_batch,
        account=job.account,
        streams=job.streams(job.instruction.stage),
    )
    return encode_reply(answer.state, len(job.train), allowed(answer.metrics))


@app.evaluate()
@_codes_only
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the server's state on the client's held-out part."""
    job = _Job(message, context)
    if job.config.privacy.unit == "example":
        raise UserError("metrics on a client's examples have no noise; they do not leave it under privacy.unit=example")
    if not job.held_out:
        raise UserError(f"'{job.instruction.client}' holds nothing out; set data.client_test_fraction above 0")
    metrics = evaluate_round(job.adapted, job.task, job.held_out, state=job.state(), frozen=job.frozen(), train=job.config.train)
    return Message(encode_reply(State(), len(job.held_out), metrics), reply_to=message)
