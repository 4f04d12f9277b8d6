"""What a run leaves at its end for others to load."""

from __future__ import annotations

from fedsb.adapters.export import export_head, export_peft
from fedsb.app.assembly import task_of
from fedsb.config.schema import Config
from fedsb.core.folders import filled_whole
from fedsb.models.adapted import AdaptedModel
from fedsb.models.loading import locate
from fedsb.run.folder import RunFolder


def export_run(config: Config, adapted: AdaptedModel, folder: RunFolder, said: str = "") -> None:
    """Write what the base lacks for others to load: an adapter in PEFT's format, or the head alone where there is no adapter.

    Where clients keep a part of the model for themselves there is nothing to write: nobody has the whole. What is ``said`` of the model
    lies beside an adapter, as ``README.md``.
    """
    if not adapted.spec.has_global_model:
        return
    head = adapted.beside_base()
    if not adapted.spec.factors:
        export_head(head, folder.head)
        return
    with filled_whole(folder.adapter) as scratch:
        export_peft(adapted.model, scratch, base_model=base_of(config), task_type=task_of(config).peft_type, head=head)
        if said:
            (scratch / "README.md").write_text(f"{said}\n", encoding="utf-8")


def base_of(config: Config) -> str:
    """Return where the base model lies: a hub id, a folder, or the name of a configuration."""
    return config.model.name if config.model.kind == "config" else locate(config.model)
