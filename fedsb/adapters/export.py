"""A trained model as a PEFT LoRA adapter, with everything that the federation learned: factors, residual in the frozen part, head."""

from __future__ import annotations

import json
import math
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedsb.adapters.frozen_part import MERGE
from fedsb.adapters.layer import LowRankLayer, layers
from fedsb.adapters.low_rank import Term, joined, recompressed
from fedsb.adapters.merging import merged_copy, product_of
from fedsb.core.errors import UserError
from fedsb.core.state import HEAD, Name, State

LARGEST_SVD = 1024  # of min(m, n): some seconds a layer
PREFIX = "base_model.model."
# PEFT saves these modules for these tasks, asked or not, and would wrap a part of one twice if the part were named beside the whole.
ALWAYS_SAVED: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def effective_factors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each adapted layer's whole weight change as factors ``U`` (m, ρ) and ``V`` (ρ, n), float32 on the CPU.

    Without a residual ρ is the layer's rank. With one that is held as factors, these are put beside and recompressed to the smallest ρ >= 1
    that loses nothing above rounding level. One that is a matrix is decomposed as such, O(m n min(m, n)) a layer, up to
    :data:`LARGEST_SVD`; beyond, it is a factor itself, of rank min(m, n), beside a unit matrix.
    """
    return {name: _factors(layer) for name, layer in layers(model).items()}


def export_peft(model: nn.Module, folder: str | Path, *, base_model: str, task_type: str, head: State) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` for ``PeftModel.from_pretrained(base, folder)``.

    Args:
        model: the adapted model.
        folder: where to write; created where missing.
        base_model: hub id or folder of the base model, for PEFT's ``base_model_name_or_path``.
        task_type: PEFT's name of the task, such as ``SEQ_CLS`` or ``CAUSAL_LM``.
        head: what the base does not hold outside the adapters, by dotted parameter name; modules that are tied to it are saved too.

    Raises:
        UserError: a head parameter belongs to the model itself and not to a module in it, which PEFT can't save.
    """
    factors = effective_factors(model)
    head = _with_ties(model, head)
    saved = _modules_to_save(model, head, task_type)
    # An adapter inside a saved module travels merged, within that module's own weights.
    factors = {name: pair for name, pair in factors.items() if not _inside(name, saved)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_tensors(model, factors, saved, head), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = _peft_config(model, factors, saved, base_model=base_model, task_type=task_type)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def export_head(head: State, path: str | Path) -> None:
    """Write a head alone, which is no adapter that PEFT could load, for ``model.load_state_dict(load_file(path), strict=False)``."""
    save_file({name.module: tensor.detach().cpu().clone().contiguous() for name, tensor in head.items()}, path, metadata={"format": "pt"})


def _factors(layer: LowRankLayer) -> tuple[Tensor, Tensor]:
    left, right = product = product_of(layer)
    terms = layer.frozen.terms
    if terms is None:
        left, right = _of_matrix(layer, product)
    elif terms:
        left, right = recompressed(*joined([*((u.cpu(), v.cpu()) for u, v in terms), product], torch.float64))
    return left.float().contiguous(), right.float().contiguous()


def _of_matrix(layer: LowRankLayer, product: Term) -> Term:
    residual = layer.residual
    if residual is None:  # a matrix that is nothing, or so small that a merge has rounded all of it away
        return product
    whole = residual.cpu() + product[0] @ product[1]
    m, n = whole.shape
    unit = torch.eye(min(m, n), dtype=whole.dtype)
    pair = (unit, whole) if m <= n else (whole, unit)
    return recompressed(*pair, least=_rounding_noise(layer)) if min(m, n) <= LARGEST_SVD else pair


def _rounding_noise(layer: LowRankLayer) -> float:
    """Bound the spectral norm of the rounding of ``W0 + residual``, or of a residual beside W0: it would pass for one of full rank."""
    weight: Tensor = layer.base.weight  # type: ignore[assignment]
    merges, (m, n) = layer.frozen.rule == MERGE, layer.shape
    rounded, dtype = (weight, weight.dtype) if merges else (layer.residual, torch.float32)
    assert rounded is not None
    return torch.finfo(dtype).eps * float(rounded.double().square().mean().sqrt()) * (math.sqrt(m) + math.sqrt(n))


def _with_ties(model: nn.Module, head: State) -> State:
    """Name a tied parameter by every module that holds it: PEFT gives each module that it saves a weight of its own."""
    every = list(model.named_parameters(remove_duplicate=False))
    tensors = {id(p): head[Name(name, HEAD)] for name, p in every if Name(name, HEAD) in head}
    return State({Name(name, HEAD): tensors[id(p)] for name, p in every if id(p) in tensors})


def _ties_an_embedding(model: nn.Module, saved: list[str]) -> bool:
    """Tell whether the input embedding is saved and is the output's too, which PEFT then keeps so."""
    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    weights = {id(getattr(end, "weight", None)) for end in ends}
    return None not in ends and len(weights) == 1 and any(model.get_submodule(name) in ends for name in saved)


def _modules_to_save(model: nn.Module, head: State, task_type: str) -> list[str]:
    """Name the outermost modules that hold nothing but head parameters, and those that PEFT saves anyway."""
    own = {name.module for name in head}
    rest = [name for name, _ in model.named_parameters() if name not in own]
    saved = {name for name in ALWAYS_SAVED.get(task_type, ()) if name in dict(model.named_children())}
    for parameter in sorted(own):
        if not _inside(parameter, saved):
            saved.add(_outermost(parameter, rest))
    return sorted(saved)


def _outermost(parameter: str, rest: list[str]) -> str:
    path = parameter.split(".")[:-1]
    if not path:
        raise UserError(f"head parameter '{parameter}' belongs to no module, which PEFT can't save; export the merged model")
    prefixes = [".".join(path[: i + 1]) for i in range(len(path))]
    return next((p for p in prefixes if not any(name.startswith(f"{p}.") for name in rest)), prefixes[-1])


def _inside(name: str, modules: list[str] | set[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _tensors(model: nn.Module, factors: dict[str, tuple[Tensor, Tensor]], saved: list[str], head: State) -> dict[str, Tensor]:
    trained = {name.module: tensor for name, tensor in head.items()}
    tensors: dict[str, Tensor] = {}
    for module in saved:
        for key, value in merged_copy(model.get_submodule(module)).state_dict().items():
            tensors[f"{PREFIX}{module}.{key}"] = trained.get(f"{module}.{key}", value).detach().cpu().clone().contiguous()
    for name, (u, v) in factors.items():
        tensors |= {f"{PREFIX}{name}.lora_A.weight": v, f"{PREFIX}{name}.lora_B.weight": u}
    return tensors


def _peft_config(
    model: nn.Module, factors: dict[str, tuple[Tensor, Tensor]], saved: list[str], *, base_model: str, task_type: str
) -> dict[str, Any]:
    """Return what PEFT reads as a ``LoraConfig``; what is not here has its default there.

    Written without PEFT, which takes seconds to import.
    """
    ranks = {name: v.shape[0] for name, (_, v) in factors.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    # PEFT matches these as patterns at the end of a name; the anchor keeps one layer's rank from another whose name ends alike.
    others = {f"^{name}": rank for name, rank in ranks.items() if rank != usual}
    adapted = layers(model)
    return {
        "peft_type": "LORA",
        "peft_version": version("peft"),
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "modules_to_save": saved or None,
        "ensure_weight_tying": _ties_an_embedding(model, saved),
        "fan_in_fan_out": any(isinstance(adapted[name].base, Conv1D) for name in ranks),
    }
