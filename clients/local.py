"""What a client does with an instruction beside training: evaluate, or give evidence for the start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from clients.evidence import sketch_gradients
from fedsb.adapters.starts import SIDES, Sketch
from fedsb.config.schema import TrainConfig
from fedsb.core.rng import numpy_generator
from fedsb.core.state import State
from fedsb.models.adapted import AdaptedModel
from fedsb.models.collating import collate
from fedsb.models.evaluate import evaluate
from fedsb.tasks.task import Batch, Task
from fedsb.wire.frozen import FrozenView

Features = Sequence[dict[str, Any]]


def evaluate_round(
    adapted: AdaptedModel, task: Task, features: Features, *, state: State, frozen: FrozenView, train: TrainConfig
) -> dict[str, float]:
    """Install a state and evaluate it on one client's held-out examples."""
    adapted.install(state, frozen)
    return evaluate(adapted, task, features, train=train)


def draw_evidence(features: Features, num_examples: int, *, seed: int, client: str) -> list[dict[str, Any]]:
    """Return the client's examples for the gradient: the same ones in every exchange of a run."""
    size = min(num_examples, len(features))
    chosen = numpy_generator(seed, "evidence", client).choice(len(features), size=size, replace=False)
    return sorted((features[i] for i in chosen), key=lambda f: len(f["input_ids"]))


def give_evidence(
    adapted: AdaptedModel, task: Task, examples: Features, *, sketch: Sketch, stage: str, probes: State, micro_batch: int
) -> State:
    """Return the client's product of the mean gradient with the probes of a stage.

    Args:
        adapted: the model; evidence is taken at W0 with the adapters off.
        task: gives the loss.
        examples: what :func:`draw_evidence` drew.
        sketch: draws Ω where no probes came.
        stage: key of :data:`fedsb.adapters.starts.SIDES`.
        probes: as received; empty in the first exchange.
        micro_batch: examples in memory at once.
    """
    chunks = [examples[i : i + micro_batch] for i in range(0, len(examples), micro_batch)]
    batches = [(batch, task.terms(batch)) for batch in (collate(chunk, adapted, task) for chunk in chunks)]
    probes = probes if len(probes) else sketch.probes(adapted.shapes)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return task.loss(task.forward(model, batch), batch)

    return sketch_gradients(adapted.model, batches, loss, probes=probes, side=SIDES[stage])
