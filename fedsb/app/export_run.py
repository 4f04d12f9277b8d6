"""From a run's folder to a model of its own: ``fedsb export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedsb.adapters.export import export_head, export_peft, merged_copy
from fedsb.app.assembly import corpus_of, task_of
from fedsb.app.finished import left_of
from fedsb.config.schema import Config
from fedsb.core.errors import UserError
from fedsb.core.folders import check_makeable, filled_whole
from fedsb.models.adapted import AdaptedModel
from fedsb.models.build import build_model
from fedsb.models.loading import locate
from fedsb.models.pooling import pooling_remark
from fedsb.run.folder import RunFolder


def export_run(config: Config, adapted: AdaptedModel, folder: RunFolder) -> None:
    """Write what the base lacks for others to load: an adapter in PEFT's format, or the head alone where there is no adapter.

    Where clients keep a part of the model for themselves there is nothing to write: nobody has the whole.
    """
    if not adapted.spec.has_global_model:
        return
    head = adapted.beside_base()
    if not adapted.spec.factors:
        export_head(head, folder.head)
        return
    base = config.model.name if config.model.kind == "config" else locate(config.model)
    with filled_whole(folder.adapter) as scratch:
        export_peft(adapted.model, scratch, base_model=base, task_type=task_of(config).peft_type, head=head)


def export_merged(folder: Path, out: Path) -> tuple[Path, str]:
    """Write the merged model and its tokenizer of a run in transformers' format.

    transformers has no pooling by mean: ``fedsb_pooling`` in the model's config.json says so, and the remark what to do.

    Args:
        folder: the run's folder, with ``config.yaml`` and ``checkpoints/``.
        out: where to write; must not hold anything yet, and does not where the export fails.

    Returns:
        Where it was written, and a remark for whoever loads it; empty where there is nothing to say.

    Raises:
        UserError: the folder holds no run, or ``out`` holds files already.
    """
    check_makeable(out, f"'{out}'")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"'{out}' is not empty; name another folder: fedsb export {folder} OUT")
    left = left_of(folder, "export")
    config, snapshot = left.config, left.snapshot
    labels = corpus_of(config).labels
    task = task_of(config)
    adapted = build_model(
        config.model, config.adapter, family=config.method.adapter, task=task, labels=labels, seed=config.seed, hold=config.frozen.hold
    )
    adapted.install(snapshot.state, snapshot.frozen.view())
    merged: Any = merged_copy(adapted.model)
    if config.model.pooling != "own":
        merged.config.fedsb_pooling = config.model.pooling
    with filled_whole(out) as scratch:
        merged.save_pretrained(scratch)
        if adapted.tokenizer is not None:
            adapted.tokenizer.save_pretrained(scratch)
    return out, pooling_remark(config.model.pooling, str(out))
