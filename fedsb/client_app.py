"""The Flower ClientApp: reads an instruction, composes the configuration, hands the work to ``clients/``, encodes the reply."""

# ruff: noqa: E402 -- the submitted code must come first on the import path before any of it is imported
from __future__ import annotations

from fedsb.runtime.fab import launch_folder, prefer_submitted_code

prefer_submitted_code()

import json
from functools import cache, lru_cache
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients import draw_evidence, evaluate_round, give_evidence, train_round
from fedsb.adapters.starts import Sketch
from fedsb.assembly import anchored, client_examples, client_features, home, model_of, task_of, use_threads
from fedsb.config import load, split_overrides
from fedsb.errors import UserError
from fedsb.exactness import encoding_error
from fedsb.frozen import Frozen, FrozenMissing, FrozenStore
from fedsb.messages import Instruction, decode_instruction, encode_missing, encode_reply, quantise
from fedsb.schema import Config
from fedsb.sketching import probe_layout, sketch_of
from fedsb.state import State
from fedsb.training import Site

app = ClientApp()


@lru_cache(maxsize=8)
def _config(overrides: str) -> Config:
    return anchored(load(split_overrides(overrides)), launch_folder())


@cache
def _store(folder: Path) -> FrozenStore:
    return FrozenStore(folder)


class _Job:
    """One instruction with everything it needs."""

    def __init__(self, message: Message, context: Context) -> None:
        self.config = _config(str(context.run_config["overrides"]))
        use_threads(self.config)
        self.instruction: Instruction = decode_instruction(message.content)
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
def train(message: Message, context: Context) -> Message:
    """Train one round and upload the factors and the head."""
    job = _Job(message, context)
    try:
        frozen = job.frozen()
    except FrozenMissing:
        return Message(encode_missing(), reply_to=message)
    upload, result = train_round(
        job.adapted, job.task, job.train, state=job.state(), frozen=frozen, train=job.config.train, site=job.site()
    )
    metrics = {"loss": result.loss, "steps": result.steps}
    wire = job.config.federation.wire_dtype
    if wire != "float32":
        metrics["encoding-error"] = encoding_error(upload, quantise(upload, wire), job.adapted.spec, job.adapted.scale, frozen.basis)
    return Message(encode_reply(upload, len(job.train), metrics, wire), reply_to=message)


@app.train("evidence")
def evidence(message: Message, context: Context) -> Message:
    """Give one exchange of the gradient sketch."""
    job = _Job(message, context)
    config, instruction = job.config, job.instruction
    sketch: Sketch = sketch_of(config.init, config.adapter.rank, config.seed)
    layout = probe_layout(sketch, job.adapted.shapes, instruction.stage, first=not instruction.flats)
    job.adapted.reset()
    examples = draw_evidence(job.train, config.init.num_examples, seed=config.seed, client=instruction.client)
    state = give_evidence(
        job.adapted,
        job.task,
        examples,
        sketch=sketch,
        stage=instruction.stage,
        probes=instruction.state(layout),
        micro_batch=config.init.micro_batch,
    )
    return Message(encode_reply(state, len(job.train), {}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the server's state on the client's held-out part."""
    job = _Job(message, context)
    if not job.held_out:
        raise UserError(f"'{job.instruction.client}' holds nothing out; set data.client_test_fraction above 0")
    try:
        frozen = job.frozen()
    except FrozenMissing:
        return Message(encode_missing(), reply_to=message)
    metrics = evaluate_round(job.adapted, job.task, job.held_out, state=job.state(), frozen=frozen, train=job.config.train)
    return Message(encode_reply(State(), len(job.held_out), metrics), reply_to=message)
