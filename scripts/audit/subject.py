"""What is audited: a tiny model with canaries, and the gradients that the adversary, who is the server, works out beforehand.

Canaries are examples of a class each, in as many classes again as there are canaries: their gradients are nearly orthogonal, and ten
times as long as the clipping bound or more. A canary that is out keeps its place, with the target that the loss leaves out: its gradient
is zero, which is the neighbouring relation of the claim. Of its text a token is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from clients.clipping import Clipping, FlatClipping
from clients.private import Mechanism, PrivateFit, private_fit
from fedsb.adapters.starts import orthogonal
from fedsb.config.compose import load
from fedsb.config.schema import TrainConfig
from fedsb.core.rng import torch_generator
from fedsb.core.state import HEAD, State
from fedsb.models.adapted import AdaptedModel
from fedsb.models.build import build_model
from fedsb.models.collating import collate
from fedsb.models.fit import Site
from fedsb.privacy.accounting import Entry
from fedsb.privacy.randomness import Streams
from fedsb.tasks.task import IGNORED, TASKS, Task
from fedsb.wire.frozen import FrozenView

CANARIES, LABELS, TOKENS, LENGTH, RANK = 64, 128, 80, 6, 8
TASK = TASKS["classification"]
# Every canary begins with a token of its own, from here on, by which its being drawn is seen. Those below are the project's made-up text.
FIRST_TOKEN = 8
# The shortest canary's gradient over the clipping bound.
EXCESS = 10.0
# Of the adapters: with it a quarter of a canary's squared gradient is theirs (up to a half), the rest the head's.
ALPHA = 12.0
NETWORK = {
    "model_type": "bert",
    "vocab_size": TOKENS,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
# Plain steps at a small rate: the difference of two states is the sum of what was released, and gradients stay what they were.
TRAIN = ("optimizer=sgd", "lr=0.05", "momentum=0", "weight_decay=0", "schedule=constant", "warmup=0", "clip_norm=null", "autocast=null")
# Makes a class that clips with one fault of one that does without.
Breaks = Callable[[type[FlatClipping]], type[FlatClipping]]


@dataclass(frozen=True)
class Subject:
    """The model, the client's examples, and what the adversary works out of them beforehand.

    Attributes:
        adapted: the model.
        start: the state that the server sends.
        frozen: the basis that it sent before.
        train: the client's training.
        canaries: all of the client's examples.
        max_norm: C.
        gradients: (canaries, parameters), of each canary alone.
    """

    adapted: AdaptedModel
    start: State
    frozen: FrozenView
    train: TrainConfig
    canaries: list[dict[str, Any]]
    max_norm: float
    gradients: Tensor

    @property
    def sizes(self) -> dict[str, int]:
        """Number of values of each trained tensor, by a short name, in the order of :func:`flat`."""
        return {short(f"{name.module}.{name.role}"): p.numel() for name, p in self.adapted.trainable().items()}

    def train_once(
        self, data: list[dict[str, Any]], clipping: Clipping, entry: Entry, streams: Streams, *, task: Task = TASK, site: Site, **how: Any
    ) -> PrivateFit:
        """Train a round as the client does."""
        self.adapted.install(self.start, self.frozen)
        charged = how.pop("charged", None)
        mechanism = Mechanism(clipping, entry.sampling_rate, entry.steps, **how)
        return private_fit(self.adapted, task, data, train=self.train, site=site, mechanism=mechanism, streams=streams, charged=charged)


def subject(seed: int) -> Subject:
    """Draw model and canaries, and set the clipping bound to a tenth of the shortest gradient."""
    words = torch.randint(1, TOKENS, (CANARIES, LENGTH - 1), generator=torch_generator(seed, "canaries")).tolist()
    canaries = [{"input_ids": [FIRST_TOKEN + i, *more], "target": i} for i, more in enumerate(words)]
    return prepared(NETWORK, canaries, labels=LABELS, max_length=LENGTH, excess=EXCESS, seed=seed)


def prepared(network: dict[str, Any], canaries: list[dict[str, Any]], *, labels: int, max_length: int, excess: float, seed: int) -> Subject:
    """Build a tiny model with adapters and a head, and set the clipping bound ``excess`` times below the shortest gradient."""
    own = (f"rank={RANK}", f"adapter.alpha={ALPHA}", f"train.max_length={max_length}", *(f"train.{value}" for value in TRAIN))
    config = load(["method=fed_sb", *own])
    model = replace(config.model, kind="config", name="tiny", path=None, config=network)
    adapted = build_model(model, config.adapter, family="lora_sb", task=TASK, labels=tuple(str(i) for i in range(labels)), seed=seed)
    adapted.tokenizer = tokenizer_of(max_length)
    drawn = orthogonal(adapted.shapes, RANK, seed)
    start, frozen = adapted.initial.pick(HEAD).merge(drawn.pick("R")), FrozenView(drawn.pick(*adapted.spec.in_log))
    adapted.install(start, frozen)
    gradients = torch.stack([gradient(adapted, canary) for canary in canaries])
    return Subject(adapted, start, frozen, config.train, canaries, float(gradients.norm(dim=1).min()) / excess, gradients)


def tokenizer_of(max_length: int) -> PreTrainedTokenizerFast:
    """Return a tokeniser whose words are numbers, for the texts that the project makes up; canaries are tokens from the beginning."""
    words = Tokenizer(WordLevel({str(i): i for i in range(TOKENS)}, unk_token=str(TOKENS - 1)))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", unk_token=str(TOKENS - 1), model_max_length=max_length)


def gradient(adapted: AdaptedModel, canary: dict[str, Any]) -> Tensor:
    """Return an example's gradient by plain autograd, in the order of :func:`flat`."""
    batch = collate([canary], adapted, TASK)
    loss = TASK.losses(TASK.forward(adapted.model, batch), batch).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(adapted.trainable().values()))]).double()


def flat(state: State) -> Tensor:
    """Return a state as one vector."""
    return torch.cat([tensor.flatten() for tensor in state.values()])


def zeroed(examples: Sequence[dict[str, Any]], present: Any) -> list[dict[str, Any]]:
    """Return examples, zeroed out where they are not present: the first token is left, by which the audit knows them."""
    blank = [{**e, "input_ids": e["input_ids"][:1], "target": IGNORED} for e in examples]
    return [e if there else without for e, without, there in zip(examples, blank, present, strict=True)]


def short(name: str) -> str:
    """Return the end of a module's path, which tells the tensors of a tiny model apart."""
    parts = [part for part in name.split(".") if part not in ("dense", "bert", "encoder", "layer", "0", "head")]
    return ".".join(parts)
