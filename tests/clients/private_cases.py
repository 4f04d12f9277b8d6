"""What the tests of private training share: a tiny model of each kind, what a round's steps looked like, and a slow oracle."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clients.clipping import CLIPPINGS, Clipping, FlatClipping
from clients.private import Mechanism, PrivateFit, private_fit
from fedsb.adapters import SPECS
from fedsb.config.compose import load
from fedsb.core.rng import numpy_generator, torch_generator
from fedsb.core.state import Name, State
from fedsb.models.adapted import AdaptedModel
from fedsb.models.build import build_model
from fedsb.models.collating import collate
from fedsb.models.fit import Site
from fedsb.privacy.accounting import Entry
from fedsb.privacy.randomness import Streams, simulated_streams
from fedsb.tasks.task import TASKS, Task
from fedsb.wire.frozen import FrozenView

SITE = Site(seed=3, client="client-1", round=1, num_rounds=1)
TRAIN = replace(load().train, optimizer="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, prox_mu=0.0, clip_norm=None, schedule="constant")
# Shortest and longest differ by a factor of ten: a mean over a batch's tokens would show.
LENGTHS = (3, 9, 5, 30, 12, 7, 4, 21, 6, 3)
Gradient = dict[Name, Tensor]


@dataclass(frozen=True)
class Case:
    """A model with its data, and the server's state."""

    adapted: AdaptedModel
    task: Task
    features: list[dict[str, Any]]
    state: State
    frozen: FrozenView

    @cached_property
    def oracle(self) -> list[Gradient]:
        """The gradient of each example alone, by plain autograd in float64."""
        self.adapted.install(self.state, self.frozen)
        double = copy.deepcopy(self.adapted)
        double.model.double().eval()
        return [example_gradient(double, self.task, feature) for feature in self.features]

    @cached_property
    def norms(self) -> list[float]:
        return [joint_norm(g) for g in self.oracle]


@dataclass(frozen=True)
class Step:
    """A noised step as it was taken: the clipped sum, the gradient handed to the optimiser, and C and σ then."""

    sum: Gradient
    grad: Gradient
    max_norm: float
    noise_multiplier: float


def build_case(
    folder: Path, task: str, family: str, start: str = "later", *, dropout: bool = False, overrides: tuple[str, ...] = ()
) -> Case:
    """Build a case; ``start`` is ``later`` for a state that is nowhere zero, else one of the family's own starts."""
    config = load(["model=pretrained", f"model.name='{folder}'", "rank=2", *overrides])
    adapted = build_model(config.model, config.adapter, family=family, task=TASKS[task], labels=("a", "b", "c"), seed=0)
    if not dropout:
        silence(adapted.model)
    draw = numpy_generator(0, "texts")
    features = [{"input_ids": draw.integers(5, 30, n).tolist(), "target": n % 3} for n in LENGTHS]
    frozen = {
        Name(module, role): torch.zeros_like(layer.weight_of(role))
        for module, layer in adapted.layers.items()
        for role in adapted.spec.in_log
    }
    made = adapted.initial.merge(State(frozen))
    if start == "later":
        made = State({name: t + 0.1 * torch.randn(t.shape, generator=torch_generator(0, "test", *name)) for name, t in made.items()})
    elif adapted.spec.factors:
        made = made.merge(SPECS[family].starts[start](adapted.weights(), 2, 0))
    return Case(adapted, TASKS[task], features, made, FrozenView(made.pick(*adapted.spec.in_log)))


make_case = cache(build_case)


def silence(model: nn.Module) -> None:
    """Turn every dropout off, also in the attention, where it is a number."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout_prob", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def example_gradient(adapted: AdaptedModel, task: Task, feature: dict[str, Any]) -> Gradient:
    batch = collate([feature], adapted, task)
    trained = adapted.trainable()
    loss = task.losses(task.forward(adapted.model, batch), batch).sum()
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def joint_norm(gradient: Gradient) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in gradient.values()))


def distance(one: Gradient, other: Gradient) -> float:
    assert set(one) == set(other)
    return joint_norm({name: one[name].double() - other[name].double() for name in one})


def clipped_sum(gradients: Sequence[Gradient], max_norm: float, kind: str = "flat") -> Gradient:
    """Clip each gradient on its own and add up, one after the other."""
    total = {name: torch.zeros_like(t) for name, t in gradients[0].items()}
    for gradient in gradients:
        for name, t in gradient.items():
            norm, bound = joint_norm(gradient), max_norm
            if kind == "per_layer":
                norm, bound = joint_norm({name: t}), max_norm / math.sqrt(len(gradient))
            total[name] += t * min(1.0, bound / norm)
    return total


def mechanism(max_norm: float = 1.0, *, sigma: float = 0.0, rate: float = 1.0, steps: int = 1, **options: Any) -> Mechanism:
    """Return a mechanism; without noise unless told. Options are those of :class:`Clipping` and :class:`Mechanism`."""
    own = {key: options.pop(key) for key in ("max_batch", "functorch", "constant_time") if key in options}
    return Mechanism(Clipping(options.pop("kind", "flat"), max_norm, sigma, **options), rate, steps, **own)


def streams(seed: int = 0) -> Streams:
    return simulated_streams(seed, "client-1", 1, "train", torch.device("cpu"))


def drawn(case: Case, rate: float, seed: int = 0) -> list[int]:
    """Return the first Poisson sample."""
    return torch.rand(len(case.features), generator=streams(seed).sampling).lt(rate).nonzero().flatten().tolist()


def fit(case: Case, how: Mechanism, *, seed: int = 0, check: bool = False, **train: Any) -> PrivateFit:
    """Train a round from the case's state, through the real path."""
    case.adapted.install(case.state, case.frozen)
    charged = Entry("gaussian", how.sampling_rate, how.clipping.noise_multiplier, how.steps) if check else None
    return private_fit(
        case.adapted,
        case.task,
        case.features,
        train=replace(TRAIN, **train),
        site=SITE,
        mechanism=how,
        streams=streams(seed),
        charged=charged,
    )


def watch(case: Case, how: Mechanism, **options: Any) -> list[Step]:
    """Train a round and return its steps."""
    found: list[Step] = []
    build = CLIPPINGS[how.clipping.kind]

    def observed(*args: Any, **kwargs: Any) -> FlatClipping:
        made = build(*args, **kwargs)
        names = list(case.adapted.trainable())

        def note() -> None:
            sums = {name: p.summed_grad.clone() for name, p in zip(names, made.params, strict=True)}
            grads = {name: p.grad.clone() for name, p in zip(names, made.params, strict=True)}
            found.append(Step(sums, grads, float(made.max_grad_norm), float(made.noise_multiplier)))

        made.observers.append(note)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CLIPPINGS, how.clipping.kind, observed)
        fit(case, how, **options)
    return found
