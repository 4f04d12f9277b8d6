"""CPU time of a round of local training, against a hand-written loop over one shared PEFT model that does the same steps.

Ours is the real thing: the strategy, messages through :class:`~fedsb.runtime.local.LocalGrid`, the ClientApp, the mean and its
checks. The loop has its model, tokens and batch plans at hand, copies the server's tensors in and adds the client's to a mean.
Both take turns client by client, ours first in one round and second in the next, so that a busy machine slows both alike.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from figures import Figure
from flwr.app import Context, Message
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from fedsb.app.assembly import corpus_of
from fedsb.app.client_data import client_features
from fedsb.app.prepare import prepare
from fedsb.app.threads import use_threads
from fedsb.client_app import app
from fedsb.config.compose import load
from fedsb.config.derived import client_names
from fedsb.config.schema import Config
from fedsb.core.rng import stream_seed
from fedsb.core.state import HEAD, Name, State, squared_norm, subtract
from fedsb.models.fit import Site, plan_batches
from fedsb.models.loading import locate
from fedsb.run.records import RoundRecord
from fedsb.runtime.local import LocalGrid
from fedsb.wire.arrays import encode_arrays
from fedsb.wire.frozen import FrozenLog

CLIENTS, RANK = 8, 8
LORA, FED_SB = ("method=fedavg_lora",), ("method=fed_sb", "init.kind=orthogonal")


def settings(steps: int, rounds: int, *more: str) -> list[str]:
    """Return the overrides of a measured federation: equal clients, batches of 16 articles cut to 64 tokens."""
    federation = [f"federation.num_clients={CLIENTS}", f"federation.num_rounds={rounds}", "federation.partition.kind=iid"]
    return [*more, *federation, f"rank={RANK}", f"train.local_steps={steps}", "train.max_length=64", "runtime.threads=1", "device=cpu"]


class Work:
    """Counts the steps and the tokens, padding included, that go through a model."""

    def __init__(self, model: nn.Module) -> None:
        self.steps = self.tokens = 0
        model.get_input_embeddings().register_forward_hook(self._note)  # type: ignore[operator]

    def _note(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.steps, self.tokens = self.steps + 1, self.tokens + inputs[0].numel()


class PeftLoop:
    """The opponent: LoRA on the same layers by PEFT, the head beside it, AdamW, FedAvg over the clients.

    Args:
        config: a configuration of ``fedavg_lora``.
        initial: the first server state.
    """

    def __init__(self, config: Config, initial: State) -> None:
        labels = corpus_of(config).labels
        base = AutoModelForSequenceClassification.from_pretrained(locate(config.model), num_labels=len(labels))
        targets = initial.modules
        self.model = get_peft_model(base, LoraConfig(r=config.adapter.rank, lora_alpha=int(config.adapter.alpha), target_modules=targets))
        self.model.train()
        self.names = list(initial)
        parameters = dict(self.model.named_parameters())
        self.parameters = [parameters[_peft_name(name)].requires_grad_(True) for name in self.names]
        self.server = [t.clone() for t in initial.values()]
        self.features = {client: client_features(config, client, None, labels)[0] for client in client_names(config)}
        self.work = Work(base)
        self._config = config
        self._start_round()

    def _start_round(self) -> None:
        self.losses: list[float] = []
        self.weight = 0
        self._sums = [torch.zeros_like(t) for t in self.server]

    def plan(self, client: str, round_number: int) -> list[list[int]]:
        """Return the batches that our client draws."""
        site = Site(self._config.seed, client, round_number, self._config.federation.num_rounds)
        return plan_batches([len(f["input_ids"]) for f in self.features[client]], self._config.train, site)

    def train(self, client: str, round_number: int, plan: Sequence[Sequence[int]]) -> None:
        """Train one client from the server's tensors and add what comes out to the mean."""
        features, train = self.features[client], self._config.train
        torch.manual_seed(stream_seed(self._config.seed, "dropout", client, round_number))
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.server, strict=True):
                parameter.copy_(value)
        optimizer = torch.optim.AdamW(self.parameters, lr=train.lr, weight_decay=train.weight_decay)
        total = 0.0
        for indices in plan:
            batch, targets = _collate([features[i] for i in indices])
            loss = F.cross_entropy(self.model(**batch).logits, targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item()
        for held, parameter in zip(self._sums, self.parameters, strict=True):
            held.add_(parameter.detach(), alpha=len(features))
        self.weight += len(features)
        self.losses.append(total / len(plan))

    def close(self) -> float:
        """Make the mean the next server state; return the round's mean loss."""
        self.server = [t / self.weight for t in self._sums]
        loss = sum(self.losses) / len(self.losses)
        self._start_round()
        return loss

    def state(self) -> State:
        """Return the server state by our names."""
        return State(dict(zip(self.names, self.server, strict=True)))


def _peft_name(name: Name) -> str:
    return f"base_model.model.{name.module}" + ("" if name.role == HEAD else f".lora_{name.role}.default.weight")


def _collate(features: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Tensor], Tensor]:
    longest = max(len(f["input_ids"]) for f in features)
    rows = [len(f["input_ids"]) for f in features]
    batch = {key: torch.tensor([f[key] + [0] * (longest - len(f[key])) for f in features]) for key in ("input_ids", "token_type_ids")}
    batch["attention_mask"] = torch.tensor([[1] * n + [0] * (longest - n) for n in rows])
    return batch, torch.tensor([f["target"] for f in features])


@dataclass
class Round:
    """CPU seconds, steps, tokens and mean loss of both sides in one round."""

    seconds: tuple[float, float]
    work: tuple[tuple[int, int], tuple[int, int]]
    losses: tuple[float, float]


class Duel:
    """Is our ClientApp and listens to our strategy; has the loop train each client beside ours.

    Args:
        loop: the opponent.
        model: our network.
    """

    def __init__(self, loop: PeftLoop, model: nn.Module) -> None:
        self.rounds: list[Round] = []
        self.last = State()
        self._loop, self._ours = loop, Work(model)
        self._mark = self._theirs = 0.0

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message, and train its client by the loop before or after."""
        config = message.content.config_records["config"]
        if message.metadata.message_type != "train":
            return app(message, context)
        client, number = str(config["client"]), int(config["round"])  # type: ignore[arg-type]
        if number % 2:
            self._train(client, number)
        reply = app(message, context)
        if not number % 2:
            self._train(client, number)
        return reply

    def _train(self, client: str, number: int) -> None:
        setup = time.process_time()
        plan = self._loop.plan(client, number)
        begun = time.process_time()
        self._mark += begun - setup  # the plan is nobody's time
        self._loop.train(client, number, plan)
        self._theirs += time.process_time() - begun

    def begin(self, round_number: int, clients: Sequence[str], stage: str) -> None:
        """Nothing to note."""

    def reply(self, client: str, ok: bool) -> None:
        """Stop at a client that failed."""
        assert ok, f"{client} failed"

    def end(self, record: RoundRecord, state: State, frozen: FrozenLog) -> None:
        """Close the round on both sides."""
        now = time.process_time()
        if record.round:
            loss = self._loop.close()
            closing = time.process_time() - now
            work = [(w.steps, w.tokens) for w in (self._ours, self._loop.work)]
            seconds = (now - self._mark - self._theirs, self._theirs + closing)
            self.rounds.append(Round(seconds, (work[0], work[1]), (record.train_loss or 0.0, loss)))
        for counter in (self._ours, self._loop.work):
            counter.steps = counter.tokens = 0
        self.last, self._theirs, self._mark = state, 0.0, time.process_time()


def duel(method: Sequence[str], steps: int, rounds: int) -> tuple[Duel, PeftLoop]:
    """Run a federation of ours beside the loop."""
    lora = load(settings(steps, rounds, *LORA))
    use_threads(lora)
    loop = PeftLoop(lora, prepare(lora).initial)
    overrides = settings(steps, rounds, *method)
    prepared = prepare(load(overrides))
    both = Duel(loop, prepared.adapted.model)
    prepared.strategy.listener = both
    grid = LocalGrid.simulation(both, {"overrides": shlex.join(overrides)})
    prepared.strategy.start(grid, encode_arrays(prepared.initial), num_rounds=rounds)
    for r in both.rounds:
        assert r.work[0] == r.work[1] and r.work[0][0] == CLIENTS * steps, f"unequal work: {r.work}"
    return both, loop


def figures(quick: bool) -> list[Figure]:
    """Measure both methods; the first round warms up and does not count."""
    steps, rounds = (2, 2) if quick else (4, 6)
    both, loop = duel(LORA, steps, rounds)
    state = loop.state()
    drift = (squared_norm(subtract(both.last, state)) / squared_norm(state)) ** 0.5
    mine, other = both.rounds[-1].losses
    sparse, _ = duel(FED_SB, steps, rounds)
    tokens = both.rounds[-1].work[0][1]
    return [
        Figure(f"round of 8 clients, FedAvg-LoRA r=8, CPU over a PEFT loop's ({tokens} tokens)", _ratio(both), 1.05),
        Figure("  CPU seconds of the round, ours", median(r.seconds[0] for r in both.rounds[1:])),
        Figure("  CPU seconds of the round, PEFT loop", median(r.seconds[1] for r in both.rounds[1:])),
        Figure(f"  relative distance of the server states after {rounds} rounds", drift, 1e-3),
        Figure("  training loss of the last round, ours", mine),
        Figure("  training loss of the last round, PEFT loop", other),
        Figure("round of 8 clients, Fed-SB r=8, CPU over the same loop's", _ratio(sparse)),
    ]


def _ratio(both: Duel) -> float:
    return median(r.seconds[0] / r.seconds[1] for r in both.rounds[1:])
