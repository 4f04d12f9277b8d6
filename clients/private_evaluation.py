"""A client's metrics under ``privacy.unit=example``: means of bounded values with Gaussian noise, charged before they are computed.

What is released of an example is a point in the unit cube: whether its class was found (where there are classes), and its loss over
``eval_max_loss``, both cut to [0, 1]. Two such points are at most √k apart, k their number of values, so the sum over the held-out
examples has an l2 sensitivity of √k under the adjacency of all other releases (one example zeroed out), and where one is replaced too;
the noise on each value of the sum is that times the noise multiplier. The number of examples, by which it is divided, is public. Metrics
that are no mean of bounded values (macro-F1, correlations, perplexity) are not released.

Held-out examples are no data set of their own: they are in the ledger of the client's data, where evaluations add up with trainings.
Which rows are held out follows from a run's seed, so that another run may train on them; within one run that counts too much, never too
little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedsb.config.schema import PrivacyConfig, TrainConfig
from fedsb.core.errors import UserError
from fedsb.core.state import State
from fedsb.models.adapted import AdaptedModel
from fedsb.models.evaluate import measured
from fedsb.models.fit import Features
from fedsb.privacy.account import Account
from fedsb.tasks.task import Task
from fedsb.wire.frozen import FrozenView

EVALUATE = "evaluate"


def private_metrics(
    adapted: AdaptedModel,
    task: Task,
    features: Features,
    *,
    state: Callable[[], State],
    frozen: Callable[[], FrozenView],
    round_number: int,
    train: TrainConfig,
    privacy: PrivacyConfig,
    account: Account,
    generator: torch.Generator,
) -> dict[str, float]:
    """Return noised means over the held-out examples, the noise's standard deviation, and the account.

    The means have no bias: one near an end of [0, 1] may lie beyond it.

    Args:
        adapted: the model.
        task: gives what is kept of each example.
        features: all held-out examples, at least one.
        state: gives what is evaluated, and with ``frozen`` raises where the client lacks some of it: nothing is charged then.
        frozen: likewise.
        round_number: after which is evaluated.
        train: of its lengths.
        privacy: gives ``eval_max_loss``.
        account: plan and ledger.
        generator: of the noise, on the CPU.

    Raises:
        BudgetExceeded: nothing was charged or computed.
        UserError: the plan has no evaluation after that round, or its delta does not fit the number of held-out examples; likewise.
    """
    key = account.key(round_number, EVALUATE)
    if (kept := account.kept(key)) is not None:
        return kept[1]
    entry = account.plan.evaluation
    if entry is None or round_number not in account.plan.evaluated:
        raise UserError(f"this client's plan has no evaluation after round {round_number}; its noise does not cover one")
    if account.plan.delta >= 1 / len(features):
        raise UserError(f"privacy.delta={account.plan.delta:g} is not below 1/{len(features)} for the examples that are held out; lower it")
    evaluated, held = state(), frozen()
    account.charge(key, entry)
    adapted.install(evaluated, held)
    found = noised(bounded(task, *_each_alone(adapted, task, features, train), privacy.eval_max_loss), entry.noise_multiplier, generator)
    found["clipped_loss"] *= privacy.eval_max_loss
    metrics = {**found, **account.metrics(account.plan.training if account.plan.rounds else entry)}
    account.keep(key, State(), metrics)
    return metrics


def _each_alone(adapted: AdaptedModel, task: Task, features: Features, train: TrainConfig) -> tuple[Tensor, Tensor | None]:
    """Measure each example in a batch of its own: the length of another would pad it, and rounding can tip what a bound counts as one."""
    return measured(adapted, task, features, train=replace(train, eval_batch_size=1))


def noised(values: Mapping[str, Tensor], multiplier: float, generator: torch.Generator) -> dict[str, float]:
    """Return the means of values that :func:`bounded` gives, (examples,) by name, with noise, and the noise's standard deviation."""
    spread = multiplier * math.sqrt(len(values)) / len(next(iter(values.values())))
    noise = torch.randn(len(values), generator=generator, dtype=torch.float64) * spread
    return {**{name: float(value.mean() + drawn) for (name, value), drawn in zip(values.items(), noise, strict=True)}, "noise": spread}


def bounded(task: Task, records: Tensor, targets: Tensor | None, max_loss: float) -> dict[str, Tensor]:
    """Return what is released of each example, (examples,) in [0, 1] by name: whatever the model's outputs are, NaN included.

    Args:
        task: reads the records.
        records: of :func:`fedsb.models.evaluate.measured`.
        targets: likewise.
        max_loss: what a loss is cut to, and divided by.
    """
    items = task.items(records, targets)
    found = {"accuracy": items["accuracy"].double()} if "accuracy" in items else {}
    found["clipped_loss"] = items["loss"].double() / max_loss
    return {name: value.nan_to_num(nan=1.0).clamp(0.0, 1.0) for name, value in found.items()}
