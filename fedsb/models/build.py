"""From a configuration to a model with its adapters on: which layers take one, what is trained beside them, what a user should know."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from fedsb.adapters import (
    ALL_LINEAR,
    SPECS,
    AdapterSpec,
    attach,
    is_adaptable,
    layers,
    left_out,
    match_targets,
    scale_of,
    used_by_hand,
)
from fedsb.adapters.quantised import is_quantised
from fedsb.config.schema import AdapterConfig, ModelConfig
from fedsb.core.collector import uncollected
from fedsb.core.errors import NothingToTrainError, UserError
from fedsb.data import pad_id
from fedsb.models.adapted import AdaptedModel
from fedsb.models.heads import drawn_in, remarks_on
from fedsb.models.loading import POOLERS, load_network, load_tokenizer, resolve_device
from fedsb.models.lookups import try_body
from fedsb.models.pooling import pool_by_mean
from fedsb.models.spread import settle
from fedsb.models.wide import widen
from fedsb.tasks.task import Task

_CACHE: dict[str, AdaptedModel] = {}


def cached_model(
    model: ModelConfig, adapter: AdapterConfig, *, family: str, task: Task, labels: tuple[str, ...], seed: int, device: str, hold: str
) -> AdaptedModel:
    """Return the process's one instance for these settings. Only the last is kept: a model is large, and sweeps change it rarely."""
    key = json.dumps([asdict(model), asdict(adapter), family, task.name, labels, seed, device, hold], default=str)
    if key not in _CACHE:
        _CACHE.clear()
        _CACHE[key] = build_model(model, adapter, family=family, task=task, labels=labels, seed=seed, device=device, hold=hold)
    return _CACHE[key]


def forget_models() -> None:
    """Drop the process's instance: what its weights lie in is about to change."""
    _CACHE.clear()


@uncollected()
def build_model(
    model: ModelConfig,
    adapter: AdapterConfig,
    *,
    family: str,
    task: Task,
    labels: tuple[str, ...],
    seed: int,
    device: str = "cpu",
    hold: str = "auto",
) -> AdaptedModel:
    """Load a model and put adapters on it.

    Args:
        model: which model.
        adapter: rank, scale and targets.
        family: key of :data:`fedsb.adapters.SPECS`.
        task: gives the kind of model and its head.
        labels: class names in order.
        seed: names the stream from which missing weights (a new head) are drawn.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``meta`` (shapes only).
        hold: how what a run adds to a frozen weight is held: see :mod:`fedsb.adapters.frozen_part`.

    Raises:
        UserError: no such model, no weights in its folder, targets that match nothing, a rank that is too large, no parameter to
            train, a pooling that does not fit the model, or a model that does not fit the GPUs that it is to be spread over.
    """
    device = device if device == "meta" else resolve_device(device)
    spec = SPECS[family].having(adapter.options)
    _check_fits(model, spec, task)
    network = load_network(model, task, labels, seed, device)
    head = head_parameters(network, model.head, task, pooler=model.pooling == "own")
    _check_floats(network, head, model)
    if model.pooling == "mean":
        _check_pooler_rests(network, head)
        pool_by_mean(network)
    targets = _targets(network, adapter.targets, head) if spec.factors else []
    widen(network, head)
    scale = scale_of(adapter.alpha, adapter.rank, rslora=adapter.rslora) if adapter.scale is None else adapter.scale
    attach(network, spec, targets=targets, rank=adapter.rank, scale=scale, dropout=adapter.dropout, hold=hold)
    parameters = dict(network.named_parameters())
    for name in head:
        parameters[name].requires_grad_(True)
    settle(network, model, device)
    tokenizer = None if device == "meta" else _tokenizer(network, model)
    drawn = tuple(name for name in drawn_in(network) if name not in head)
    adapted = AdaptedModel(network, spec, scale, head, tokenizer, drawn=drawn, seed=seed)
    adapted.remarks = tuple(_remarks(network, adapter, head, drawn))
    if device != "meta":
        adapted.initial = adapted.copied(*spec.ever_learn)
    return adapted


@uncollected()
def plain_model(model: ModelConfig, *, task: Task, labels: tuple[str, ...], seed: int, device: str) -> AdaptedModel:
    """Load a model as it is, without adapters and with nothing to train, to be evaluated.

    Raises:
        UserError: no such model, or it lacks the head that the task asks for.
    """
    device = resolve_device(device)
    network = load_network(model, task, labels, seed, device)
    if task.has_head and drawn_in(network):
        raise UserError(f"'{model.name}' holds no {', '.join(drawn_in(network))} for the task '{task.name}'; name a model that has them")
    if model.pooling == "mean":
        pool_by_mean(network)
    settle(network, model, device)
    return AdaptedModel(network, SPECS["head_only"], 1.0, (), _tokenizer(network, model))


def _tokenizer(network: nn.Module, model: ModelConfig) -> PreTrainedTokenizerBase | None:
    tokenizer = load_tokenizer(model)
    if tokenizer is not None:
        settings: Any = network.config
        # Sequence models look for the last token that is not this one; without it they refuse batches.
        settings.pad_token_id = pad_id(tokenizer)
    return tokenizer


# In training their fused kernels multiply by these weights, where they are installed; PEFT refuses an adapter on out_proj.
FUSED: dict[str, tuple[str, ...]] = {
    "mamba": (".x_proj", ".dt_proj", ".out_proj"),
    "falcon_mamba": (".x_proj", ".dt_proj", ".out_proj"),
    "mamba2": (".out_proj",),
    "falcon_h1": (".out_proj",),
    "nemotron_h": (".out_proj",),
}


def _targets(network: nn.Module, targets: str | tuple[str, ...], head: tuple[str, ...]) -> list[str]:
    """Choose the layers to adapt: none of the head, and none whose adapter the body would overlook in a pass over a few tokens."""
    owners = {name.rpartition(".")[0] for name in head}
    linear = [name for name, module in network.named_modules() if is_adaptable(module)]
    fused = FUSED.get(str(getattr(network.config, "model_type", "")), ())
    by_hand = used_by_hand(network, linear, lambda: try_body(network)) | {name for name in linear if name.endswith(fused)}
    return match_targets(network, targets, exclude=(*POOLERS, *owners, *_output_embedding(network)), by_hand=by_hand)


def _remarks(network: nn.Module, adapter: AdapterConfig, head: tuple[str, ...], drawn: tuple[str, ...]) -> Iterator[str]:
    """Say what is special about a model: what it lacked, what is done to its head, and which layers stay as they are."""
    yield from remarks_on(network)
    body = f"{network.base_model_prefix}."
    learnt = [name for name in drawn_in(network) if name in head and name.startswith(body)]
    if learnt:
        yield f"the model's files hold no {', '.join(learnt)}: drawn at random, trained with the head and saved beside the adapter"
    if drawn:
        yield f"the model's files hold no {', '.join(drawn)}: drawn at random, saved beside the adapter and not trained (model.head)"
    rest = left_out(network) if layers(network) and adapter.targets == ALL_LINEAR else ""
    if rest:
        yield f"adapter.targets={ALL_LINEAR} leaves as they are: {rest}"


def _check_fits(model: ModelConfig, spec: AdapterSpec, task: Task) -> None:
    """Refuse what cannot go together before the weights are read, which may take minutes."""
    if not spec.factors and not _has_head(model.head, task):
        raise NothingToTrainError(
            f"nothing to train: '{spec.name}' has no adapters, and with model.head={model.head} the task '{task.name}' has no head; "
            "choose a task with a head, name parameters in model.head, or take another method"
        )
    if model.pooling != "own" and not task.has_head:
        raise UserError(f"model.pooling={model.pooling} is for tasks with a head, and '{task.name}' has none; use model.pooling=own")


def _check_floats(network: nn.Module, head: tuple[str, ...], model: ModelConfig) -> None:
    parameters = dict(network.named_parameters())
    if held := [name for name in head if is_quantised(parameters[name])]:
        raise UserError(
            f"model.quantize={model.quantize} holds {len(held)} of the parameters that are to be trained ('{held[0]}'), and cannot learn "
            "them; use model.quantize=none, or name others in model.head"
        )


def _check_pooler_rests(network: nn.Module, head: tuple[str, ...]) -> None:
    """Refuse to train the body's pooler where its result is thrown away: it would never get a gradient."""
    body = f"{network.base_model_prefix}."
    lost = next((name for name in head if name.startswith(body) and any(fnmatchcase(name, pooler) for pooler in POOLERS)), None)
    if lost is not None:
        raise UserError(f"model.head names '{lost}', which model.pooling=mean leaves unused; drop it, or use model.pooling=own")


def _has_head(head: str | tuple[str, ...], task: Task) -> bool:
    return bool(head) and head != "none" and (head != "auto" or task.has_head)


def head_parameters(network: nn.Module, head: str | tuple[str, ...], task: Task, *, pooler: bool = True) -> tuple[str, ...]:
    """Return the sorted names of the parameters trained beside the adapters.

    ``auto`` takes everything outside the pretrained body for tasks with a head, and nothing for language models. What of the body was
    drawn at random belongs to it, unless it is a pooler and ``pooler`` says that its result is thrown away.

    Raises:
        UserError: a pattern matches no parameter.
    """
    names = [name for name, _ in network.named_parameters()]
    if not _has_head(head, task):
        return ()
    if head == "auto":
        body = f"{network.base_model_prefix}."
        drawn = [name for name in drawn_in(network) if pooler or not any(fnmatchcase(name, pattern) for pattern in POOLERS)]
        return tuple(sorted(name for name in names if not name.startswith(body) or name in drawn))
    patterns = (head,) if isinstance(head, str) else head
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"model.head '{pattern}' matches no parameter; use auto, none, or a pattern such as '{names[-1]}'")
    return tuple(sorted(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)))


def _output_embedding(network: nn.Module) -> tuple[str, ...]:
    find: Any = getattr(network, "get_output_embeddings", None)
    output = find() if find else None
    return tuple(name for name, module in network.named_modules() if output is not None and module is output)
