"""Under which licence a base model's own files say that they are."""

from __future__ import annotations

from importlib.metadata import metadata
from pathlib import Path

import yaml

from fedsb.config.schema import ModelConfig
from fedsb.core.errors import UserError
from fedsb.models.loading import locate

FENCE = "---"


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
    return str(fields["license"]) if isinstance(fields, dict) and fields.get("license") else None
