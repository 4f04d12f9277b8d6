"""Models with their adapters on: loaded once a process, then only written to."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fedsb.adapters import SPECS, AdapterSpec, LowRankLayer, attach, layers, match_targets, read, release, scale_of, set_residuals, write
from fedsb.data import pad_id
from fedsb.errors import NothingToTrainError, UserError
from fedsb.frozen import Frozen
from fedsb.loading import POOLERS, load_network, load_tokenizer
from fedsb.pooling import pool_by_mean
from fedsb.schema import AdapterConfig, ModelConfig
from fedsb.state import HEAD, Layout, Name, State
from fedsb.tasks import Task


@dataclass
class AdaptedModel:
    """A frozen model with low-rank layers and a trained head.

    Attributes:
        model: the network; factors and head are the only parameters that require gradients.
        spec: the adapter family.
        scale: s of every layer.
        head: sorted names of the trained parameters outside the adapters.
        tokenizer: of the model; None for shapes without weights.
        initial: trained factors and head as they were built.
    """

    model: nn.Module
    spec: AdapterSpec
    scale: float
    head: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase | None
    initial: State = field(default_factory=State)

    @cached_property
    def layers(self) -> dict[str, LowRankLayer]:
        """The adapted layers by sorted name."""
        return layers(self.model)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(m, n) of every adapted layer."""
        return {name: layer.shape for name, layer in self.layers.items()}

    @cached_property
    def layout(self) -> Layout:
        """Layout of what is trained and travels: factors and head."""
        parameters = dict(self.model.named_parameters())
        shapes: dict[Name, tuple[int, ...]] = {
            Name(module, role): self.spec.shape(role, *layer.shape, layer.rank)
            for module, layer in self.layers.items()
            for role in self.spec.trained
        }
        shapes |= {Name(name, HEAD): tuple(parameters[name].shape) for name in self.head}
        return Layout(tuple(sorted(shapes.items())))

    def trained(self) -> State:
        """Copy what is trained out of the model."""
        return read(self.model, *self.spec.trained).merge(self._head_state())

    def _head_state(self) -> State:
        parameters = dict(self.model.named_parameters())
        return State({Name(name, HEAD): parameters[name].detach().to("cpu", torch.float32, copy=True) for name in self.head})

    def reset(self) -> None:
        """Bring the model back to what it was when it was built; a process keeps it from one run to the next."""
        release(self.model)
        self.install(self.initial, Frozen())

    def install(self, state: State, frozen: Frozen) -> None:
        """Bring a whole server state into the model: frozen factors, held without a copy, and residuals, trained factors, head."""
        write(self.model, frozen.basis)
        set_residuals(self.model, frozen.residuals)
        write(self.model, state)
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in state.pick(HEAD).items():
                parameters[name.module].copy_(tensor)

    def trainable(self) -> dict[Name, nn.Parameter]:
        """Return the parameters that a client trains, by name."""
        parameters = dict(self.model.named_parameters())
        found: dict[Name, nn.Parameter] = {Name(name, HEAD): parameters[name] for name in self.head}
        for module, layer in self.layers.items():
            for role in self.spec.trained:
                found[Name(module, role)] = cast(nn.Parameter, layer.factor(role).weight)
        return {name: found[name] for name in sorted(found)}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def weights(self) -> dict[str, Tensor]:
        """Return the pristine W0 of every adapted layer, viewed (out, in)."""
        return {name: layer.pristine for name, layer in self.layers.items()}


_CACHE: dict[str, AdaptedModel] = {}


def cached_model(
    model: ModelConfig, adapter: AdapterConfig, *, family: str, task: Task, labels: tuple[str, ...], seed: int, device: str
) -> AdaptedModel:
    """Return the process's one instance for these settings. Only the last is kept: a model is large, and sweeps change it rarely."""
    key = json.dumps([asdict(model), asdict(adapter), family, task.name, labels, seed, device], default=str)
    if key not in _CACHE:
        _CACHE.clear()
        _CACHE[key] = build_model(model, adapter, family=family, task=task, labels=labels, seed=seed, device=device)
    return _CACHE[key]


def forget_models() -> None:
    """Drop the process's instance: what its weights lie in is about to change."""
    _CACHE.clear()


def build_model(
    model: ModelConfig, adapter: AdapterConfig, *, family: str, task: Task, labels: tuple[str, ...], seed: int, device: str = "cpu"
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

    Raises:
        UserError: no such model, no weights in its folder, targets that match nothing, a rank that is too large, no parameter to
            train, or a pooling that does not fit the model.
    """
    spec = SPECS[family]
    _check_fits(model, spec, task)
    network = load_network(model, task, labels, seed, device)
    head = head_parameters(network, model.head, task)
    if model.pooling == "mean":
        _check_pooler_rests(network, head)
        pool_by_mean(network)
    owners = {name.rpartition(".")[0] for name in head}
    excluded = (*POOLERS, *owners, *_output_embedding(network))
    targets = match_targets(network, adapter.targets, exclude=excluded) if spec.factors else []
    scale = scale_of(adapter.alpha, adapter.rank, rslora=adapter.rslora)
    attach(network, spec, targets=targets, rank=adapter.rank, scale=scale, dropout=adapter.dropout)
    parameters = dict(network.named_parameters())
    for name in head:
        # A copy: what is trained may not lie in memory that other processes map.
        parameters[name].data = parameters[name].data.clone()
        parameters[name].requires_grad_(True)
    tokenizer = None if device == "meta" else load_tokenizer(model)
    settings: Any = network.config
    if tokenizer is not None and getattr(settings, "pad_token_id", None) is None:
        # Sequence models look for the last real token; without a padding id they refuse batches.
        settings.pad_token_id = pad_id(tokenizer)
    adapted = AdaptedModel(network, spec, scale, head, tokenizer)
    if device != "meta":
        adapted.initial = adapted.trained()
    return adapted


def _check_fits(model: ModelConfig, spec: AdapterSpec, task: Task) -> None:
    """Refuse what cannot go together before the weights are read, which may take minutes."""
    if not spec.factors and not _has_head(model.head, task):
        raise NothingToTrainError(
            f"nothing to train: '{spec.name}' has no adapters, and with model.head={model.head} the task '{task.name}' has no head; "
            "choose a task with a head, name parameters in model.head, or take another method"
        )
    if model.pooling != "own" and not task.has_head:
        raise UserError(f"model.pooling={model.pooling} is for tasks with a head, and '{task.name}' has none; use model.pooling=own")


def _check_pooler_rests(network: nn.Module, head: tuple[str, ...]) -> None:
    """Refuse to train the body's pooler where its result is thrown away: it would never get a gradient."""
    body = f"{network.base_model_prefix}."
    lost = next((name for name in head if name.startswith(body) and any(fnmatchcase(name, pooler) for pooler in POOLERS)), None)
    if lost is not None:
        raise UserError(f"model.head names '{lost}', which model.pooling=mean leaves unused; drop it, or use model.pooling=own")


def _has_head(head: str | tuple[str, ...], task: Task) -> bool:
    return bool(head) and head != "none" and (head != "auto" or task.has_head)


def head_parameters(network: nn.Module, head: str | tuple[str, ...], task: Task) -> tuple[str, ...]:
    """Return the sorted names of the parameters trained beside the adapters.

    ``auto`` takes everything outside the pretrained body for tasks with a head, and nothing for language models.

    Raises:
        UserError: a pattern matches no parameter.
    """
    names = [name for name, _ in network.named_parameters()]
    if not _has_head(head, task):
        return ()
    if head == "auto":
        body = f"{network.base_model_prefix}."
        return tuple(sorted(name for name in names if not name.startswith(body)))
    patterns = (head,) if isinstance(head, str) else head
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"model.head '{pattern}' matches no parameter; use auto, none, or a pattern such as '{names[-1]}'")
    return tuple(sorted(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)))


def _output_embedding(network: nn.Module) -> tuple[str, ...]:
    find: Any = getattr(network, "get_output_embeddings", None)
    output = find() if find else None
    return tuple(name for name, module in network.named_modules() if output is not None and module is output)
