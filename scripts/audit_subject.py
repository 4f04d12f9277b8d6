"""What is audited: the client's own private training on a tiny model, with canaries, whole or broken on purpose.

Canaries are examples of a class each, in as many classes again as there are canaries: their gradients are nearly orthogonal, and ten
times as long as the clipping bound or more. A canary that is out keeps its place, with the target that the loss leaves out: its gradient
is zero, which is the neighbouring relation of the claim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from clients.clipping import CLIPPINGS, Clipping, FlatClipping
from clients.private import Mechanism, private_fit
from fedsb.adapters.starts import orthogonal
from fedsb.config import load
from fedsb.frozen import BASIS, Frozen
from fedsb.models import AdaptedModel, build_model
from fedsb.privacy.accounting import Entry
from fedsb.privacy.randomness import Streams
from fedsb.rng import numpy_generator, torch_generator
from fedsb.schema import TrainConfig
from fedsb.state import HEAD, State
from fedsb.tasks import IGNORED, TASKS
from fedsb.training import Site, collate

CANARIES, LABELS, TOKENS, LENGTH, RANK = 64, 128, 32, 6, 8
TASK = TASKS["classification"]
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


class NoNoise(FlatClipping):
    """Forgets the noise."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.noise_multiplier = 0.0


class NoClipping(FlatClipping):
    """Lets every gradient through at its own length."""

    def factors(self, norms: Tensor) -> Tensor:
        """Return ones."""
        return torch.ones_like(norms)


class HeadLeftOut(FlatClipping):
    """Clips the adapters' gradients by their own norm and never touches the head's: the optimiser does not know which are which."""

    head: Tensor

    def factors(self, norms: Tensor) -> Tensor:
        """Return ones for the head."""
        return torch.where(self.head[:, None], 1.0, super().factors(norms[~self.head])[:1])


FAULTS: dict[str, type[FlatClipping]] = {"no noise": NoNoise, "no clipping": NoClipping, "head left out of the clipping": HeadLeftOut}


@dataclass(frozen=True)
class Subject:
    """The model, the client's examples, and what the adversary, who is the server, works out of them beforehand.

    Attributes:
        adapted: the model.
        start: the state that the server sends.
        frozen: the basis that it sent before.
        train: the client's training.
        canaries: all of the client's examples.
        max_norm: C.
        filters: (canaries, parameters): turns a release into a score for each canary, noise of equal size and uncorrelated on all.
    """

    adapted: AdaptedModel
    start: State
    frozen: Frozen
    train: TrainConfig
    canaries: list[dict[str, Any]]
    max_norm: float
    filters: Tensor

    def scores(self, entry: Entry, bits: np.ndarray[Any, Any], *, clipping: str, seed: int, run: int) -> Tensor:
        """Train once on the canaries whose bit is set and score all of them on the state that comes back."""
        self.adapted.install(self.start, self.frozen)
        data = [c if bit else {**c, "target": IGNORED} for c, bit in zip(self.canaries, bits, strict=True)]
        mechanism = Mechanism(Clipping(clipping, self.max_norm, entry.noise_multiplier), entry.sampling_rate, entry.steps)
        streams = Streams(*(torch_generator(seed, purpose, clipping, run) for purpose in ("noise", "poisson", "dropout")))
        site = Site(seed, "audited", 1, 1)
        private_fit(self.adapted, TASK, data, train=self.train, site=site, mechanism=mechanism, streams=streams)
        return self.filters @ (flat(self.start) - flat(self.adapted.trained()))


def subject(seed: int) -> Subject:
    """Draw model and canaries, and set the clipping bound to a tenth of the shortest gradient."""
    config = load(["method=fed_sb", f"rank={RANK}", f"adapter.alpha={ALPHA}", *(f"train.{value}" for value in TRAIN)])
    model = replace(config.model, kind="config", name="tiny", path=None, config=NETWORK)
    labels = tuple(str(i) for i in range(LABELS))
    adapted = build_model(model, config.adapter, family="lora_sb", task=TASK, labels=labels, seed=seed)
    # All that batches ask of a tokeniser.
    adapted.tokenizer = cast(
        PreTrainedTokenizerBase, SimpleNamespace(pad_token_id=0, pad_token_type_id=0, eos_token_id=None, model_max_length=LENGTH)
    )
    drawn = orthogonal(adapted.shapes, RANK, seed)
    start, frozen = adapted.initial.pick(HEAD).merge(drawn.pick("R")), Frozen(drawn.pick(*BASIS))
    adapted.install(start, frozen)
    words = numpy_generator(seed, "canaries")
    canaries = [{"input_ids": words.integers(1, TOKENS, LENGTH).tolist(), "target": i} for i in range(CANARIES)]
    gradients = torch.stack([gradient(adapted, canary) for canary in canaries])
    bound = float(gradients.norm(dim=1).min()) / EXCESS
    return Subject(adapted, start, frozen, config.train, canaries, bound, whitened(gradients).float())


def gradient(adapted: AdaptedModel, canary: dict[str, Any]) -> Tensor:
    """Return an example's gradient by plain autograd, in the order of :func:`flat`."""
    batch = collate([canary], adapted, TASK)
    loss = TASK.losses(TASK.forward(adapted.model, batch), batch).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(adapted.trainable().values()))]).double()


def whitened(gradients: Tensor) -> Tensor:
    """Return the orthonormal rows closest to the gradients' directions: noise of equal size, uncorrelated, on every score."""
    left, _, right = torch.linalg.svd(gradients / gradients.norm(dim=1, keepdim=True), full_matrices=False)
    rows: Tensor = left @ right
    return rows


def flat(state: State) -> Tensor:
    """Return a state as one vector."""
    return torch.cat([tensor.flatten() for tensor in state.values()])


@contextmanager
def planted(fault: str | None, audited: Subject) -> Iterator[str]:
    """Give the kind of clipping to train with: the real one, or a broken one that the client knows inside the block."""
    if fault is None:
        yield "flat"
        return
    is_head = torch.tensor([name.role == HEAD for name in audited.adapted.trainable()])
    CLIPPINGS[fault] = type(fault, (FAULTS[fault],), {"head": is_head})
    try:
        yield fault
    finally:
        del CLIPPINGS[fault]


def experiment(audited: Subject, entry: Entry, fault: str | None, *, runs: int, seed: int, tell: Callable[[int], None]) -> tuple[Any, Any]:
    """Return scores and bits of many runs, (runs, canaries) each: fair coins, noise and samples are drawn anew for every run."""
    bits = numpy_generator(seed, "bits", fault or "", entry.steps).integers(0, 2, (runs, CANARIES)).astype(bool)
    scores = np.empty(bits.shape)
    with planted(fault, audited) as clipping:
        for run in range(runs):
            scores[run] = audited.scores(entry, bits[run], clipping=clipping, seed=seed, run=run).numpy()
            tell(run + 1)
    if not np.isfinite(scores).all():
        raise SystemExit("a release was not finite; nothing can be said about its privacy")
    return scores, bits
