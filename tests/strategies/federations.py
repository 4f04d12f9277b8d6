"""Whole federations of tiny models in this process, over the real ClientApp, with every message kept."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import join
from typing import Any

import torch
from flwr.app import Context, Message
from torch import Tensor

from fedsb.app.asked import config_of as client_config
from fedsb.app.own_factors import made_factors
from fedsb.app.prepare import Prepared, prepare
from fedsb.app.threads import use_threads
from fedsb.client_app import app as client_app
from fedsb.config.compose import free_start, load
from fedsb.config.schema import Config
from fedsb.config.settings import FEDERATED
from fedsb.core.state import HEAD, Name, State
from fedsb.models.adapted import AdaptedModel
from fedsb.models.build import build_model
from fedsb.run.records import RoundRecord
from fedsb.runtime.local import LocalGrid
from fedsb.server_app import evaluator
from fedsb.tasks.task import TASKS
from fedsb.wire.arrays import encode_arrays
from fedsb.wire.frozen import FrozenLog
from fedsb.wire.frozen_cache import FrozenCache
from fedsb.wire.messages import Instruction, Reply, decode_instruction, decode_reply
from fedsb.wire.short_states import received
from strategies import STRATEGIES
from tests.strategies.dense import added_of, product_of

ClientCall = Callable[[Message, Context], Message]
SPLIT = Path(__file__).resolve().parents[2] / "scripts" / "split_data.py"
Dense = dict[str, Tensor]
# A baseline that is no federation has laws of its own: tests.strategies.methods.test_baselines.
FEDERATED_METHODS = [method for method in STRATEGIES if load([f"method={method}"]).method.setting == FEDERATED]


@dataclass(frozen=True)
class Exchange:
    """An instruction and the reply to it, with what the messages are."""

    kind: str
    node: int
    instruction: Instruction
    reply: Message

    @property
    def answer(self) -> Reply:
        """The reply, decoded."""
        return decode_reply(self.reply.content)

    @property
    def uploaded(self) -> bool:
        """Whether the client answered with an upload."""
        return not self.reply.has_error() and not self.answer.missing


class KeepingGrid(LocalGrid):
    """Keeps what goes over it."""

    def __init__(self, app: ClientCall, run_config: dict[str, Any], node_configs: dict[int, dict[str, Any]]) -> None:
        super().__init__(app, run_config, node_configs)
        self.exchanges: list[Exchange] = []
        self._pushed: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        kept = list(messages)
        ids = super().push_messages(kept)
        self._pushed.update(zip(ids, kept, strict=True))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = super().pull_messages(message_ids)
        for reply in replies:
            self._keep(self._pushed[reply.metadata.reply_to_message_id], reply)
        return replies

    def _keep(self, message: Message, reply: Message) -> None:
        if not message.metadata.message_type.startswith("query."):
            instruction = decode_instruction(message.content)
            self.exchanges.append(Exchange(message.metadata.message_type, message.metadata.dst_node_id, instruction, reply))

    def rounds(self, kind: str = "train") -> dict[int, list[Exchange]]:
        """Return the exchanges of one kind by round."""
        found: dict[int, list[Exchange]] = {}
        for exchange in self.exchanges:
            if exchange.kind == kind:
                found.setdefault(exchange.instruction.round, []).append(exchange)
        return found


@dataclass
class Keeper:
    """A listener that keeps what it is told."""

    records: list[RoundRecord] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    bases: list[State] = field(default_factory=list)

    def begin(self, round_number: int, clients: Sequence[str], stage: str) -> None: ...

    def reply(self, client: str, ok: bool) -> None: ...

    def end(self, record: RoundRecord, state: State, frozen: FrozenLog) -> None:
        self.records.append(record)
        self.states.append(state)
        self.versions.append(frozen.version)
        self.bases.append(frozen.view().basis)


@dataclass(frozen=True)
class Federation:
    """A run that is over."""

    config: Config
    prepared: Prepared
    grid: KeepingGrid
    kept: Keeper

    @property
    def records(self) -> list[RoundRecord]:
        return self.kept.records

    @property
    def frozen(self) -> FrozenLog:
        return self.prepared.strategy.frozen

    @property
    def sha256(self) -> str:
        """The fingerprint that a summary holds."""
        return self.frozen.sha256(self.kept.states[-1])

    def payload(self) -> tuple[int, int, int]:
        """Return the bytes up, down and one-off of the run."""
        return (
            sum(r.payload_up for r in self.records),
            sum(r.payload_down for r in self.records),
            sum(r.payload_one_off for r in self.records),
        )

    def fresh_model(self) -> AdaptedModel:
        """Load the model anew, as a process would that has seen nothing of the run."""
        c = self.config
        task = TASKS[c.data.task]
        return build_model(c.model, c.adapter, family=c.method.adapter, task=task, labels=self.prepared.labels, seed=c.seed)


def classification(model: Path, table: Path) -> list[str]:
    """Return the overrides of a classification task on a local table."""
    return [
        "model=pretrained", f"model.name='{model}'", "data=files", f"data.path='{table}'", "device=cpu",
        "federation.wait=0", "federation.num_clients=5", "federation.partition.kind=size", "federation.partition.sizes=[6,5,4,3,2]",
        "train.batch_size=8", "train.local_steps=2", "train.max_length=24", "rank=3", "plots=false",
    ]  # fmt: skip


def start_of(method: str, kind: str = "orthogonal") -> str:
    """Return the override of a start that asks no client: ``kind`` where the method's family has it, else the first that it has."""
    return f"init.kind={free_start(load([f'method={method}']).method.adapter, kind) or 'null'}"


def in_rounds(number: int) -> str:
    """Return the override of a number of rounds, or of as many as the method's factors have turns where that is more."""
    return f"federation.num_rounds='${{fedsb_rounds:${{method.adapter}},{number}}}'"


def language_model(model: Path, table: Path) -> list[str]:
    """Return the overrides of a causal language model on the texts of a local table."""
    return [*classification(model, table), "data.task=causal_lm", "data.label=null"]


def one_node(app: ClientCall, run_config: dict[str, Any]) -> KeepingGrid:
    """Return a grid with one simulated node."""
    return KeepingGrid(app, run_config, {1: {"partition-id": 0, "num-partitions": 1}})


# A simulated node of which the server does not know that it is one, and which it asks therefore.
ASKED: dict[int, dict[str, Any]] = {1: {"partition-id": 0}}


def federate(
    overrides: Sequence[str],
    *,
    grid: Callable[[ClientCall, dict[str, Any]], KeepingGrid] = one_node,
    app: ClientCall = client_app,
    timeout: float = 60.0,
) -> Federation:
    """Run a federation from first to last round."""
    config = client_config(join(overrides))  # composed once for both sides, which hold the same strings
    use_threads(config)
    made = grid(app, {"overrides": join(overrides)})
    prepared = prepare(config)
    kept = Keeper()
    prepared.strategy.listener = kept
    first = encode_arrays(prepared.initial, config.federation.wire_dtype)
    rounds = config.federation.num_rounds
    prepared.strategy.start(made, first, num_rounds=rounds, timeout=timeout, evaluate_fn=evaluator(prepared))
    return Federation(config, prepared, made, kept)


def mean_update(federation: Federation, exchanges: Sequence[Exchange], basis: State) -> tuple[Dense, State]:
    """Return ``s Σ w_i B_i R_i A_i`` of each module and the mean head of a round, densely in float64, from the uploads."""
    uploads = [
        (e.answer.state(federation.prepared.adapted.layouts.up_in(e.instruction.round)), e.answer.num_examples)
        for e in exchanges
        if e.uploaded
    ]
    uniform = federation.config.federation.weighting == "uniform"
    weights = [1.0 if uniform else float(count) for _, count in uploads]
    updates: Dense = {}
    heads: dict[Name, Tensor] = {}
    for (state, _), weight in zip(uploads, weights, strict=True):
        share = weight / sum(weights)
        for module, update in product(federation, state, basis).items():
            updates[module] = updates.get(module, 0) + share * update
        for name, t in state.pick(HEAD).items():
            heads[name] = heads.get(name, 0) + share * t.double()
    return updates, State(heads)


def product(federation: Federation, state: State, basis: State) -> Dense:
    """Return the dense ``s B R A`` of each module in float64."""
    adapted = federation.prepared.adapted
    found: Dense = {}
    roles = [role for role in adapted.spec.factors if role not in adapted.spec.folded]
    for module in adapted.shapes:
        factors = {role: state.get(Name(module, role), basis.get(Name(module, role))) for role in roles}
        if any(factor is None for factor in factors.values()):  # they begin anew, where the product is zero
            found[module] = torch.zeros(adapted.shapes[module], dtype=torch.float64)
            continue
        found[module] = adapted.scale * product_of(adapted.spec.name, factors)
    return found


@dataclass(frozen=True)
class Held:
    """What a client holds when it has taken an instruction in."""

    state: State
    basis: State
    residuals: Dense
    weights: Dense
    head: State


def held_by(federation: Federation, exchange: Exchange, store: FrozenCache, model: AdaptedModel) -> Held:
    """Install an instruction in a model that is nobody's, out of a cache that is the client's own."""
    if exchange.instruction.bundle is not None:
        store.receive(exchange.instruction.bundle)
    frozen = store.load(exchange.instruction.frozen)
    frozen = frozen.beside(made_factors(federation.config, model).factors)
    down = federation.prepared.adapted.layouts.down
    state = received(exchange.instruction, down, down, federation.config.seed)
    model.install(state, frozen)
    inner = product(federation, state, frozen.basis)
    # Of a part that stands beside W0, which no float32 sum has rounded.
    added = {name: torch.zeros(()) if (found := layer.residual) is None else found for name, layer in model.layers.items()}
    weights = {name: layer.pristine.double() + added[name] + inner[name] for name, layer in model.layers.items()}
    residuals = {
        module: added_of(model.spec.name, t.matrix(), {name.role: value for name, value in frozen.basis.items() if name.module == module})
        for module, t in frozen.residuals.items()
    }
    return Held(state, frozen.basis, residuals, weights, model.trained().pick(HEAD))


def next_instructions(federation: Federation, folder: Path) -> Iterator[tuple[list[Exchange], Held, list[Held]]]:
    """Yield each round's exchanges, what its clients held in it, and what each client of the next round holds after it."""
    rounds = federation.grid.rounds()
    stores: dict[str, FrozenCache] = {}
    model = federation.fresh_model()
    before: Held | None = None
    for number in sorted(rounds):
        after = []
        for exchange in rounds[number]:
            client = exchange.instruction.client
            after.append(held_by(federation, exchange, stores.setdefault(client, FrozenCache(folder / client, as_factors=True)), model))
        if before is not None:
            yield rounds[number - 1], before, after
        before = after[0]


def named(client: str, **more: str) -> dict[str, Any]:
    """Return the node configuration of an operator who serves one client."""
    return {"client": client, **more}


def split_nodes(folder: Path, overrides: Sequence[str], clients: int) -> dict[int, dict[str, Any]]:
    """Deal a federation's data out to files; return the configuration of a node for each client, with its part."""
    if not folder.exists():
        runpy.run_path(str(SPLIT))["split"](folder, overrides)
    return {i + 1: named(f"client-{i}", **{"data-path": str(folder / f"client-{i}")}) for i in range(clients)}
