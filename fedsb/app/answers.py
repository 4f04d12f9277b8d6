"""How each kind of message is answered: reads an instruction, composes the configuration, lets ``clients/`` work, encodes the reply."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import wraps

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients import draw_evidence, evaluate_round, give_evidence
from clients.faults import Faults, drawn, suffer
from clients.private_evaluation import EVALUATE, private_metrics
from fedsb.adapters.starts import Sketch
from fedsb.app.answering import coded, data_path_of, hold, leave_unnoised, own_log
from fedsb.app.asked import as_told, config_in, is_real
from fedsb.app.client_data import num_examples
from fedsb.app.client_job import Job
from fedsb.app.secure_desk import desk_for
from fedsb.app.secured import Desk
from fedsb.config.checks import FAULTS
from fedsb.config.derived import client_names, start_kind
from fedsb.config.schema import Config
from fedsb.core.errors import UserError
from fedsb.core.logs import printable
from fedsb.core.state import State
from fedsb.node.own_part import own_labels
from fedsb.node.reading import name_of, read_node
from fedsb.privacy.account import allowed
from fedsb.privacy.plan import unnoised_start
from fedsb.run.records import SHARED
from fedsb.runtime.process_memory import keep_large_blocks
from fedsb.secure.session import SecureError
from fedsb.wire.messages import decode_instruction, encode_reply
from fedsb.wire.sketch_layouts import probe_layout, sketch_of

LOG = logging.getLogger(__name__)
MOST_TOLD = 500  # characters of a server's line that a node writes to its log
app = ClientApp()
Handler = Callable[[Message, Context], Message]


def _codes_only(handler: Handler) -> Handler:
    @wraps(handler)
    def guarded(message: Message, context: Context) -> Message:
        informed = as_told(message, context)
        return coded(message, informed, lambda: handler(message, informed))

    return guarded


def _faulty(handler: Handler) -> Handler:
    """Let simulated clients suffer what ``faults`` asks for; those of a real federation have enough of their own."""

    @wraps(handler)
    def suffering(message: Message, context: Context) -> Message:
        faults = faults_of(message, context)
        return handler(message, context) if faults is None else suffer(faults, lambda: handler(message, context))

    return suffering


def faults_of(message: Message, context: Context) -> Faults | None:
    """Return what a client suffers in a round; None where the run has no faults.

    Raises:
        UserError: the federation is no simulation.
    """
    config = config_in(context)
    if not any(getattr(config.faults, kind) for kind in FAULTS):
        return None
    if is_real(context):
        raise UserError("faults are for simulations; leave faults=… out in a real federation")
    told = message.content.config_records["config"]
    return drawn(config.faults, seed=config.seed, client=str(told["client"]), round_number=int(told["round"]))  # type: ignore[arg-type]


def _named(handler: Handler) -> Handler:
    """Let a node say whom it serves in a refusal too: the server can then tell whose data are missing, and why."""

    @wraps(handler)
    def naming(message: Message, context: Context) -> Message:
        reply = handler(message, context)
        said = reply.content.config_records.get("config") or ConfigRecord()
        reply.content["config"] = ConfigRecord({"client": name_of(context.node_config), **said})
        return reply

    return naming


@app.query("notice")
def notice(message: Message, context: Context) -> Message:
    """Write a line of the server's to this node's own log."""
    told = str((message.content.config_records.get("config") or ConfigRecord()).get("notice", ""))
    with own_log(context):
        LOG.warning("run %d: %s", context.run_id, printable(told[:MOST_TOLD]))
    return Message(RecordDict({}), reply_to=message)


@app.query("describe")
@_named
@_codes_only
def describe(message: Message, context: Context) -> Message:
    """Say whom this node serves, and how many training examples each of the clients asked for has.

    A node that serves no client of the run looks at no data.
    """
    config = config_in(context)
    request = message.content.config_records["config"]
    labels = tuple(json.loads(str(request["labels"])))
    node = read_node(context.node_config)
    own = node.client if node else ""
    names = [own] if own else json.loads(str(request["clients"]))
    if own and own not in client_names(config):
        counts = [0]
    else:
        leave_unnoised(context, config, labels)
        named = own_labels(labels, node)
        counts = [num_examples(config, name, data_path_of(context, name), named) for name in names]
        hold(message, context, sum(counts))
    content = {
        "config": ConfigRecord({"client": own, "counted": json.dumps(names), **({"rank": node.rank} if node and node.rank else {})}),
        "metrics": MetricRecord({"num-examples": counts}),
    }
    return Message(RecordDict(content), reply_to=message)  # type: ignore[arg-type]


@app.train()
@_codes_only
@_faulty
def train(message: Message, context: Context) -> Message:
    """Train one round and upload the factors and the head."""
    job = Job(message, context)
    keep_large_blocks(job.adapted.device)
    with job.turn():
        upload = job.round.alone(job.state())
    return Message(job.reply(upload), reply_to=message)


def _secured(answer: Callable[[Desk], State]) -> Handler:
    """Return what answers a message of a secure sum beside training: it needs neither data nor a model."""

    def handler(message: Message, context: Context) -> Message:
        instruction = decode_instruction(message.content)
        data_path_of(context, instruction.client)  # a node answers for its own client alone
        return Message(encode_reply(answer(desk_for(context, instruction)), 0, {}), reply_to=message)

    return _codes_only(handler)


app.train("keys")(_secured(Desk.advertise))
app.train("shares")(_secured(Desk.give))
app.train("survivors")(_secured(Desk.confirm))
app.train("unmask")(_secured(Desk.answer))


@app.train("evidence")
@_codes_only
def evidence(message: Message, context: Context) -> Message:
    """Give one exchange of the gradient sketch."""
    job = Job(message, context)
    config, instruction = job.config, job.instruction
    _refuse_open(config)
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


def _refuse_open(config: Config) -> None:
    """Refuse, in a run with secure sums, what the server would see of one client alone."""
    if config.federation.secure_sum:
        raise SecureError("federation.secure_sum=true: a sketch of what one client has is not summed, and the server would see it")


def _give_privately(job: Job, sketch: Sketch, stage: str, number: int, probes: State) -> RecordDict:
    from clients.private_start import private_evidence

    with job.turn():
        answer = private_evidence(
            job.adapted,
            job.task,
            job.train,
            sketch=sketch,
            stage=stage,
            number=number,
            probes=probes,
            train=job.config.train,
            privacy=job.config.privacy,
            micro_batch=job.config.init.micro_batch,
            account=job.account,
            streams=job.streams(job.instruction.stage),
        )
    return job.reply(answer, wire_dtype="float32")


@app.train("projection")
@_codes_only
def projection(message: Message, context: Context) -> Message:
    """Give the projection of what was trained in this round, the second exchange of methods that have one."""
    job = Job(message, context)
    _refuse_open(job.config)
    return Message(job.reply(job.projected()), reply_to=message)


def _measured_privately(job: Job) -> dict[str, float]:
    """Measure what the client holds and no more: that of the shared part alone would be another release."""
    return private_metrics(
        job.adapted,
        job.task,
        job.held_out,
        state=job.state,
        frozen=lambda: job.frozen,
        round_number=job.instruction.round,
        train=job.config.train,
        privacy=job.config.privacy,
        account=job.account,
        generator=job.streams(EVALUATE).sampling,
    )


@app.evaluate()
@_codes_only
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the server's state, with what is the client's own, on its held-out part; after the last round without its own too."""
    job = Job(message, context)
    if not job.held_out:
        return Message(encode_reply(State(), 0, {}), reply_to=message)
    if job.config.privacy.unit == "example":
        with job.turn():
            metrics = allowed(_measured_privately(job), evaluation=True)
        return Message(encode_reply(State(), len(job.held_out), metrics), reply_to=message)

    def on_held_out(state: State) -> dict[str, float]:
        return evaluate_round(job.adapted, job.task, job.held_out, state=state, frozen=job.frozen, train=job.config.train)

    metrics = on_held_out(job.state())
    if job.adapted.spec.own and job.instruction.round == job.config.federation.num_rounds:
        metrics |= {f"{SHARED}{name}": value for name, value in on_held_out(job.shared_state()).items()}
    return Message(encode_reply(State(), len(job.held_out), metrics), reply_to=message)
