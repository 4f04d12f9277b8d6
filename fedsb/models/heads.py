"""What of a loaded network its checkpoint did not hold, and whether the head that it held is for the labels at hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn


def drawn_names(network: nn.Module, info: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the sorted names of the parameters that the checkpoint lacks, by what transformers says of loading it."""
    missing = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    return tuple(sorted(name for name, _ in network.named_parameters() if name in missing))


def absent_names(network: nn.Module, folder: Path, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the parameters of the body with names like ``patterns`` that a checkpoint lacks, without reading it.

    Nothing where its tensors are not to be looked up, as those of a hub's model that is not here.
    """
    held = _tensor_names(folder)
    body = f"{network.base_model_prefix}."
    names = [name for name, _ in network.named_parameters() if name.startswith(body) and any(fnmatchcase(name, p) for p in patterns)]
    return tuple(sorted(name for name in names if held and not held & {name, name.removeprefix(body)}))


def _tensor_names(folder: Path) -> set[str]:
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if not whole.is_file():
        return set()
    with safe_open(whole, "pt") as file:
        return set(file.keys())


def note(network: nn.Module, drawn: Sequence[str], *remarks: str) -> None:
    """Let a network carry what was drawn and what a user should know of it, also to another process."""
    network.fedsb_drawn = tuple(drawn)  # type: ignore[assignment]
    network.fedsb_remarks = tuple(filter(None, remarks))  # type: ignore[assignment]


def drawn_in(network: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters that were drawn at random beside a checkpoint."""
    return tuple(getattr(network, "fedsb_drawn", ()))


def remarks_on(network: nn.Module) -> tuple[str, ...]:
    """Return what a user should know of a loaded network."""
    return tuple(getattr(network, "fedsb_remarks", ()))


def fit_head(
    network: nn.Module, known: Mapping[int, str], labels: Sequence[str], label_rows: Callable[[], Sequence[str]]
) -> tuple[str, tuple[str, ...]]:
    """Bring a head that the checkpoint held to the labels at hand, in place: rows go by name; one for other labels is drawn anew.

    Args:
        network: as it was loaded.
        known: names of the classes in the checkpoint, by row.
        labels: class names in order.
        label_rows: tells which parameters have a row a class; called only where it matters.

    Returns:
        What was done, empty where the rows stand in order already; and the parameters that were drawn.
    """
    names, wanted = [_plain(known[i]) for i in sorted(known)], [_plain(label) for label in labels]
    if names == wanted:
        return "", ()
    told = f"the model's head is for {len(names)} classes ({', '.join(known[i] for i in sorted(known))[:100]})"
    if len(names) != len(wanted):  # transformers has drawn its rows already
        return f"{told}, and the data have {len(wanted)}: it is drawn anew", ()
    if all(name == f"label_{i}" for i, name in enumerate(names)):
        return f"the model's head names no classes: its rows are taken in the order of the data's ({', '.join(labels)[:100]})", ()
    parameters = dict(network.named_parameters())
    rows = {name: parameters[name] for name in label_rows()}
    if len(set(names)) == len(names) and sorted(names) == sorted(wanted):
        order = [names.index(name) for name in wanted]
        for p in rows.values():
            p.data = p.data[order].clone()
        return f"{told}: its rows are brought into the order of the data's ({', '.join(labels)[:100]})", ()
    for p in rows.values():
        p.data = _drawn(p, network)
    return f"{told}, and the data's are others ({', '.join(labels)[:100]}): it is drawn anew", tuple(rows)


def _plain(label: str) -> str:
    return str(label).strip().casefold()


def _drawn(p: nn.Parameter, network: nn.Module) -> torch.Tensor:
    """Draw as transformers does for most heads: normal weights and no bias."""
    spread = getattr(network.config, "initializer_range", 0.02)
    return torch.randn(p.shape).to(p) * spread if p.ndim > 1 else torch.zeros_like(p)


def rows_by_label(network: nn.Module, wider: nn.Module) -> list[str]:
    """Return the parameters of a network that have one row more in ``wider``, the same for one class more."""
    shapes = {name: p.shape for name, p in wider.named_parameters()}
    return [name for name, p in network.named_parameters() if shapes[name] != p.shape]
