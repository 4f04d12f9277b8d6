"""Whether a machine and a model can do what a configuration asks of training, before any of it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from fedsb.config.schema import TrainConfig
from fedsb.core.errors import UserError
from fedsb.models.adapted import AdaptedModel
from fedsb.models.bits_and_bytes import PIP, is_there


def check_abilities(train: TrainConfig, adapted: AdaptedModel) -> None:
    """Hold training against what is installed here and what the model can do.

    Raises:
        UserError: ``train.optimizer``, ``train.gradient_checkpointing``, ``train.compile`` or ``model.attn_implementation`` asks for more.
    """
    for check in (_can_step, _can_recompute, _can_compile, _can_differentiate):
        for complaint in check(train, adapted):
            raise UserError(complaint)


def _can_step(train: TrainConfig, adapted: AdaptedModel) -> Iterator[str]:
    if train.optimizer == "adamw8bit" and not is_there():
        yield f"train.optimizer=adamw8bit needs bitsandbytes, which is not installed: {PIP}, or use train.optimizer=adamw"


def _can_recompute(train: TrainConfig, adapted: AdaptedModel) -> Iterator[str]:
    if train.gradient_checkpointing and not getattr(adapted.model, "supports_gradient_checkpointing", False):
        kind = type(adapted.model).__name__
        yield f"train.gradient_checkpointing=true is not for {kind}, which keeps its activations; leave it out, or raise train.accumulation"


def _can_compile(train: TrainConfig, adapted: AdaptedModel) -> Iterator[str]:
    if train.compile and not COMPILERS[adapted.device.type]():
        yield f"train.compile=true finds no compiler for {adapted.device.type} (C++; Triton for GPUs); install it, or leave it out"


def _can_differentiate(train: TrainConfig, adapted: AdaptedModel) -> Iterator[str]:
    if adapted.device.type == "cpu" and "flex_attention" in attention_of(adapted.model):
        yield "model.attn_implementation=flex_attention has no gradients on a CPU; use sdpa, or a GPU"


def attention_of(model: nn.Module) -> set[str]:
    """Return by what a network's parts compute attention; transformers has chosen where the configuration says nothing."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return {found for config in configs if (found := getattr(config, "_attn_implementation", None)) is not None}


def _compiles_cpp() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler  # seconds, and for compiled training alone
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


def _compiles_triton() -> bool:
    from torch.utils._triton import has_triton

    return torch.cuda.is_available() and has_triton()


COMPILERS: dict[str, Callable[[], bool]] = {"cpu": _compiles_cpp, "cuda": _compiles_triton}
