"""Steps of training to measure side by side: ours, the real ``fit``, and a loop over a PEFT model written by hand.

Both train the same layers of the same base on the same batches, with the same loss over the same tokens. The PEFT loop reads its loss once,
at the end, and has its batches on the device beforehand: nothing is put in its way.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import median
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from clients.clipping import Clipping
from clients.private import Mechanism, private_fit
from clients.stacked import taught_together
from fedsb.adapters import SPECS
from fedsb.config.compose import load
from fedsb.config.schema import TrainConfig
from fedsb.core.networks import use_networks
from fedsb.core.rng import numpy_generator
from fedsb.core.state import State
from fedsb.models.build import build_model
from fedsb.models.fit import Site, dropout_of, fit, fit_lesson
from fedsb.privacy.randomness import simulated_streams
from fedsb.stack.stack import Stack
from fedsb.tasks.task import TASKS
from fedsb.wire.frozen import FrozenView

TASK = TASKS["causal_lm"]
ROWS = 16  # of a client; batches are drawn from them


class Padding:
    """All that a model of random weights needs of a tokenizer: rows are of one length already."""

    pad_token_id = eos_token_id = pad_token_type_id = 0
    model_max_length = 2**20


@dataclass(frozen=True)
class Shape:
    """Examples in a batch, and tokens of each."""

    batch: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.tokens}"


@cache
def texts(shape: Shape, words: int, client: int = 0) -> list[dict[str, Any]]:
    """Draw a client's examples: a third of each is a prompt, of which nothing is learnt."""
    draw = numpy_generator(0, "texts", client)
    learnt = [int(i >= shape.tokens // 3) for i in range(shape.tokens)]
    return [{"input_ids": draw.integers(1, words, shape.tokens).tolist(), "learnt": learnt} for _ in range(max(ROWS, shape.batch))]


class Ours:
    """Our client on one model.

    Args:
        overrides: of the configuration: model, method, rank.
        base: network to put adapters on, which is taken; None where the configuration's own is loaded.
        device: where.
    """

    def __init__(self, overrides: Sequence[str], base: nn.Module | None, device: str) -> None:
        config = load([*overrides, "data.task=causal_lm", f"device={device}"])
        use_networks(None if base is None else lambda key, make: base)
        try:
            family = config.method.adapter
            self.adapted = build_model(config.model, config.adapter, family=family, task=TASK, labels=(), seed=0, device=device)
        finally:
            use_networks(None)
        if self.adapted.tokenizer is None:
            self.adapted.tokenizer = cast(Any, Padding())
        settings: Any = self.adapted.model.config
        self.words = int(settings.vocab_size)
        self.train = config.train
        self.rank = config.adapter.rank
        kind = next(name for name, start in SPECS[family].starts.items() if start is not None)
        kind = "orthogonal" if "orthogonal" in SPECS[family].starts else kind
        start = SPECS[family].starts[kind]
        assert start is not None
        made = self.adapted.initial.merge(start(self.adapted.weights(), config.adapter.rank, 0))
        spec = self.adapted.spec
        held = (*spec.in_log, *spec.made)
        self.frozen = FrozenView(made.pick(*held))
        self.state = State({name: t for name, t in made.items() if name.role not in held})
        self.install()

    def install(self) -> None:
        """Bring the first state into the model, as a round begins."""
        self.adapted.install(self.state, self.frozen)

    def upload(self) -> State:
        """Copy out what a round ends with."""
        return self.adapted.sent(self.adapted.trained(), 1)

    def settings(self, shape: Shape, steps: int) -> TrainConfig:
        """Return the training settings of a measured round."""
        return replace(self.train, batch_size=shape.batch, local_steps=steps, max_length=shape.tokens, lr=1e-4)

    def fit(self, shape: Shape, steps: int, client: int = 0) -> float:
        """Train for some steps; return the mean loss."""
        features = texts(shape, self.words, client)
        return fit(self.adapted, TASK, features, train=self.settings(shape, steps), site=_site(client)).loss

    def private(self, shape: Shape, steps: int) -> None:
        """Train for some private steps, every one on the same number of examples."""
        features = texts(shape, self.words)[: shape.batch]
        mechanism = Mechanism(Clipping("flat", 1.0, 0.5), 1.0, steps, max_batch=shape.batch)
        streams = simulated_streams(0, "0", 1, "train", self.adapted.device)
        train = self.settings(shape, steps)
        private_fit(self.adapted, TASK, features, train=train, site=_site(0), mechanism=mechanism, streams=streams)

    def stacked(self, shape: Shape, steps: int, clients: int) -> None:
        """Train several clients side by side."""
        train, stack = self.settings(shape, steps), Stack(self.adapted, [dropout_of(_site(i)) for i in range(clients)])
        lessons = {i: fit_lesson(member, texts(shape, self.words, i), train=train, site=_site(i)) for i, member in enumerate(stack.members)}
        ended = taught_together(stack, TASK, lessons, train=train)
        if failed := [result for result in ended.values() if isinstance(result, Exception)]:
            raise failed[0]


def _site(client: int) -> Site:
    return Site(0, str(client), 1, 1)


class PeftLoop:
    """The opponent: LoRA by PEFT on the layers that ours adapts.

    Args:
        base: network, which is taken.
        targets: names of the adapted layers.
        rank: r.
        words: in the vocabulary.
        autocast: whether it computes in mixed precision; without, PEFT takes what goes into its float32 factors to float32.
    """

    def __init__(self, base: nn.Module, targets: Sequence[str], rank: int, words: int, *, autocast: bool = False) -> None:
        self.model: nn.Module = get_peft_model(
            base,
            LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), lora_dropout=0.0, bias="none"),
        )
        self.model.train()
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._device, self._words, self._autocast = self._parameters[0].device, words, autocast
        self._batches: dict[Shape, list[dict[str, Tensor]]] = {}

    def fit(self, shape: Shape, steps: int) -> float:
        """Train for some steps; return the mean loss."""
        optimizer = torch.optim.AdamW(self._parameters, lr=1e-4, weight_decay=0.0, fused=True)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        batches = self._prepared(shape)
        for step in range(steps):
            total += self._step(batches[step % len(batches)], optimizer)
        return float(total) / steps

    def _step(self, batch: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=-100)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    def _prepared(self, shape: Shape) -> list[dict[str, Tensor]]:
        if shape not in self._batches:
            rows = texts(shape, self._words)
            ids, learnt = (torch.tensor([row[key] for row in rows], device=self._device) for key in ("input_ids", "learnt"))
            labels = F.pad(ids[:, 1:].masked_fill(learnt[:, 1:] == 0, -100), (0, 1), value=-100)
            whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            cut = range(0, len(rows) - shape.batch + 1, shape.batch)
            self._batches[shape] = [{key: t[i : i + shape.batch] for key, t in whole.items()} for i in cut]
        return self._batches[shape]


Contender = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Seconds of each contender, turn by turn."""

    seconds: Mapping[str, Sequence[float]]

    def of(self, name: str) -> float:
        """Return a contender's median."""
        return median(self.seconds[name])

    def ratio(self, one: str, other: str) -> float:
        """Return the median over the turns of what one takes over what the other does in the same turn."""
        return median(a / b for a, b in zip(self.seconds[one], self.seconds[other], strict=True))


def take_turns(contenders: Mapping[str, Contender], turns: int, device: str) -> Times:
    """Let contenders run in turn, in the other order every second time, after one run each that does not count.

    Seconds are of the clock on a GPU, which is waited for before and after, and of the process on a CPU.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name in [*contenders][:: 1 if turn % 2 else -1]:
            begun = _now(device)
            contenders[name]()
            if turn:
                seconds[name].append(_now(device) - begun)
            else:
                _now(device)
    return Times(seconds)


def _now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def gpu_peak(run: Contender) -> int:
    """Return how many bytes torch holds on the GPU at most in a call, beyond what it held before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def bytes_of(model: nn.Module) -> int:
    """Return what a model's tensors weigh, each once, zeros that take no memory left out."""
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    return sum(held.values())


def base_of(overrides: Sequence[str], device: str) -> nn.Module:
    """Return a network of the configuration's shape with random weights, made where it is used."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = load([*overrides, "data.task=causal_lm"]).model
    fields = dict(model.config)
    with torch.device(device):
        made: nn.Module = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(fields.pop("model_type"), **fields, use_cache=False), dtype=getattr(torch, model.dtype)
        )
    return made.eval()


def twin(network: nn.Module) -> nn.Module:
    """Return another network of the same weights."""
    return copy.deepcopy(network)
