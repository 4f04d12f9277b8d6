"""From a run's folder to a model for others, in the format they ask for: ``fedsb export``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsb.app.assembly import corpus_of, task_of
from fedsb.app.exports.formats import DTYPES, FORMATS, Export, write_merged
from fedsb.app.finished import Finished, left_of
from fedsb.app.own_factors import made_again
from fedsb.core.errors import UserError, unknown
from fedsb.core.folders import check_makeable, filled_whole
from fedsb.models.build import build_model
from fedsb.models.origin import Base, base_named, licence_of
from fedsb.report.card import card_text
from fedsb.report.markdown import write
from fedsb.run.folder import read_run

SHORT: Mapping[str, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def export(folder: Path, out: Path | None = None, *, form: str = "merged", dtype: str | None = None) -> tuple[Path, list[str]]:
    """Write a finished run's model, its tokenizer and a model card.

    Args:
        folder: the run's, with ``config.yaml`` and ``checkpoints/``.
        out: where to write; must not hold anything yet, and does not where the export fails. None for a folder in the run's.
        form: key of :data:`FORMATS`.
        dtype: of merged weights; None for that of the run's base.

    Returns:
        Where it was written, and remarks for whoever loads it.

    Raises:
        UserError: the folder holds no run that has finished, ``out`` holds files already, or the format does not suit the run.
    """
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    dtype = SHORT.get(dtype or "", dtype)
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, (*DTYPES, *SHORT))
    out = out or folder / form
    check_makeable(out, f"'{out}'")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"'{out}' is not empty; name another folder: fedsb export {folder} OUT")
    left = left_of(folder, "export")
    if not left.whole:
        raise UserError(f"'{folder}' has not finished (round {left.snapshot.round}): go on with it first: fedsb run resume={folder}")
    FORMATS[form].check(left.config, dtype)
    return out, written(_what(left, dtype, out), folder, out, form)


def merged_for(folder: Path, out: Path) -> Path:
    """Write the merged model of a run as far as it has come, without a card, for another program to read."""
    left = left_of(folder, "export")
    write_merged(_what(left, None, out), out)
    return out


def written(what: Export, folder: Path, out: Path, form: str) -> list[str]:
    """Write a model in a format, its card beside it; return the remarks."""
    config, kind = what.config, FORMATS[form]
    with filled_whole(out) as scratch:
        remarks = kind.write(what, scratch)
        base = base_named(config.model)
        card = card_text(
            read_run(folder),
            base=base.name,
            hub_id=base.hub_id,
            licence=licence_of(config.model),
            library=kind.library,
            how=kind.how.format(**_in_code(what, base)),
            remarks=[*remarks, *([] if base.hub_id else [f"The base is {base.where}."])],
        )
        write(scratch / "README.md", card)
    return remarks


def _in_code(what: Export, base: Base) -> dict[str, str]:
    """Return what the lines of code name, as Python writes it."""
    task, network = task_of(what.config), what.adapted.model
    settings: Any = network.config
    options = {"num_labels": settings.num_labels} if task.has_head else {}
    padding = f"\nbase.config.pad_token_id = {settings.pad_token_id}" if task.has_head and settings.pad_token_id is not None else ""
    return {
        "auto": task.auto_class.__name__,
        "out": repr(what.name),
        "base": repr(base.hub_id or "BASE"),
        "options": ", ".join(f"{key}={value!r}" for key, value in (options | {"dtype": what.config.model.dtype}).items()),
        "more": padding,
    }


def _what(left: Finished, dtype: str | None, out: Path) -> Export:
    config, snapshot = left.config, left.snapshot
    task = task_of(config)
    # Where the run has named its classes its data are not looked at: they may be gone.
    labels = tuple(map(str, config.data.labels)) if config.data.labels else corpus_of(config).labels
    adapted = build_model(
        config.model, config.adapter, family=config.method.adapter, task=task, labels=labels, seed=config.seed, hold=config.frozen.hold
    )
    adapted.install(snapshot.state, snapshot.frozen.view().beside(made_again(config, adapted, snapshot)))
    return Export(config, adapted, dtype, out.resolve().name)
