"""Which layers of a model get an adapter, and which must not."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedsb.adapters.layer import layers
from fedsb.adapters.linear import OUT_IN, is_adaptable, shape_of
from fedsb.core.errors import UserError

ALL_LINEAR = "all-linear"


def match_targets(
    model: nn.Module, targets: str | tuple[str, ...], exclude: tuple[str, ...] = (), by_hand: frozenset[str] = frozenset()
) -> list[str]:
    """Return the sorted names of the linear layers to adapt.

    Args:
        model: the model, not yet adapted.
        targets: ``all-linear`` or shell-style patterns over dotted module names (``*.query``); a pattern also matches as a suffix
            behind a dot, so ``q_proj`` finds every ``….q_proj``.
        exclude: patterns whose matches are left out (head, pooler).
        by_hand: layers that are left out since the model would take no notice of their adapter; see :func:`used_by_hand`.

    Raises:
        UserError: a pattern matches no linear layer, or only such as take no adapter.
    """
    names = sorted(name for name, module in model.named_modules() if is_adaptable(module))
    names = [name for name in names if not any(_matches(name, pattern) for pattern in exclude)]
    patterns = (targets,) if isinstance(targets, str) else tuple(targets)
    if patterns == (ALL_LINEAR,):
        # A gate of one value has no lower rank.
        chosen = {name for name in names if min(shape_of(model.get_submodule(name))) > 1} - by_hand
        if not chosen:
            raise UserError(f"adapter.targets '{ALL_LINEAR}' matches no linear layer: {_what_there_is(model)}")
        return sorted(chosen)
    if not patterns:
        raise UserError(f"adapter.targets=[] adapts nothing; use '{ALL_LINEAR}' or patterns such as [query,value]")
    return sorted(set().union(*(_hits(pattern, names, by_hand) for pattern in patterns)))


def _hits(pattern: str, names: list[str], by_hand: frozenset[str]) -> set[str]:
    hits = {name for name in names if _matches(name, pattern)}
    if not hits:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in names})
        raise UserError(f"adapter.targets '{pattern}' matches no linear layer; use '{ALL_LINEAR}' or patterns of: {', '.join(kinds)}")
    if hits <= by_hand:
        raise UserError(
            f"adapter.targets '{pattern}' names '{min(hits)}', whose weight the model multiplies by hand: it would take no notice of an "
            "adapter there; drop the pattern"
        )
    return hits - by_hand


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") or name.startswith(f"{pattern}.")


def _what_there_is(model: nn.Module) -> str:
    others = Counter(type(m).__name__ for m in model.modules() if isinstance(m, tuple(OUT_IN)) and not is_adaptable(m))
    if not others:
        return "the model has none outside its head"
    return f"its {', '.join(f'{count} {kind}' for kind, count in others.items())} do not compute as nn.Linear does"


def used_by_hand(model: nn.Module, names: Iterable[str], forward: Callable[[], Any]) -> frozenset[str]:
    """Return the layers whose weight is used outside their own forward pass: an adapter in their place would be overlooked.

    Args:
        model: the model, not yet adapted.
        names: its linear layers.
        forward: computes something with the model. Where it fails nothing is known, and nothing found.
    """
    found = {name: model.get_submodule(name) for name in names}
    watch = _Watch({id(module.weight): name for name, module in found.items()})
    hooks = [module.register_forward_pre_hook(partial(watch.enter, name)) for name, module in found.items()]
    hooks += [module.register_forward_hook(partial(watch.leave, name), always_call=True) for name, module in found.items()]
    try:
        with torch.no_grad(), watch:
            forward()
    except Exception:
        return frozenset()
    finally:
        for hook in hooks:
            hook.remove()
    return frozenset(watch.seen)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which weights an operation gets while their own layer is not at work."""

    def __init__(self, weights: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()
        self._weights = weights
        self._inside: list[str] = []

    def enter(self, name: str, *_: Any) -> None:
        self._inside.append(name)

    def leave(self, name: str, *_: Any) -> None:
        self._inside.remove(name)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        used = {self._weights[id(t)] for t in tree_leaves((args, kwargs or {})) if id(t) in self._weights}
        self.seen |= used - set(self._inside)
        return function(*args, **(kwargs or {}))


def left_out(model: nn.Module) -> str:
    """Name the frozen matrices of an adapted model that have no adapter, embeddings aside, and their share; empty where there is none."""
    adapted = {id(p) for layer in layers(model).values() for p in layer.parameters()}
    tables = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    rest = {
        name: p
        for name, p in model.named_parameters()
        if p.ndim > 1 and not p.requires_grad and id(p) not in adapted and id(p) not in tables
    }
    if not rest:
        return ""
    left, taken = sum(p.numel() for p in rest.values()), sum(math.prod(layer.shape) for layer in layers(model).values())
    share = left / (left + taken)
    names = dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name).removesuffix(".weight") for name in rest)
    return f"{', '.join(names)} ({share:.1%} of its frozen matrices' weights)"
