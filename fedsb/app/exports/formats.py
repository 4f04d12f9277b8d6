"""The formats in which a run's model is exported: how each is written, loaded and refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedsb.adapters import SPECS
from fedsb.adapters.export import export_peft
from fedsb.adapters.merging import merged_copy, rounded_away
from fedsb.app.assembly import task_of
from fedsb.app.exports.at_end import base_of
from fedsb.config.schema import Config
from fedsb.core.errors import UserError
from fedsb.models.adapted import AdaptedModel
from fedsb.models.pooling import pooling_remark
from fedsb.models.quantise import NONE

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD = "5GB"
FELT = 0.01  # of what was learnt: a merge that loses more is told
ROUNDED = (
    "In {dtype} the merged weights miss what was learnt by {lost:.1%} of its size: a change is small beside the weight that it is added to;"
    " --dtype float32 or --format peft keep it"
)
BESIDE_QUANTISED = (
    "The adapter was trained beside weights that model.quantize={kind} had rounded; beside the plain ones it answers a little otherwise. "
    "--format merged holds those that the run computed with"
)
GGUF = "python convert_hf_to_gguf.py FOLDER --outtype f16        # of llama.cpp; it then quantises what that wrote"


@dataclass(frozen=True)
class Export:
    """What is to be exported.

    Attributes:
        config: the run's.
        adapted: its model, with the last state installed.
        dtype: name of the type of merged weights; None where none was asked for.
        name: of the folder, as the lines of code in the card say it.
    """

    config: Config
    adapted: AdaptedModel
    dtype: str | None
    name: str

    @property
    def asked(self) -> torch.dtype:
        """The type of merged weights: that of the base unless another was asked for."""
        return DTYPES[self.dtype or self.config.model.dtype]


@dataclass(frozen=True)
class Format:
    """A format: how it is written, the library that loads it and the lines that do; ``check`` refuses what can't be put into it."""

    write: Callable[[Export, Path], list[str]]
    library: str
    how: str
    check: Callable[[Config, str | None], None]


def write_merged(what: Export, out: Path) -> list[str]:
    """Write plain weights in shards, tokenizer, chat template and generation settings, as transformers and vLLM read them."""
    config, adapted = what.config, what.adapted
    merged: Any = merged_copy(adapted.model, what.asked)
    _check_finite(merged, what.asked)
    _as_found(merged)
    if config.model.pooling != "own":
        merged.config.fedsb_pooling = config.model.pooling
    merged.save_pretrained(out, max_shard_size=SHARD)
    _write_tokenizer(what, out)
    lost = rounded_away(adapted.model, what.asked)
    rounded = ROUNDED.format(dtype=str(what.asked).removeprefix("torch."), lost=lost) if not lost <= FELT else ""
    return [remark for remark in (pooling_remark(config.model.pooling, what.name), rounded) if remark]


def _check_finite(merged: Any, dtype: torch.dtype) -> None:
    for name, p in merged.named_parameters():
        if beyond := int((~p.isfinite()).sum()):
            said = str(dtype).removeprefix("torch.")
            raise UserError(f"{beyond} values of '{name}' do not fit --dtype {said}; use bfloat16 or float32")


def _write_tokenizer(what: Export, out: Path) -> None:
    """Write the tokenizer; under a head it fills rows with what the model takes for padding, which looks for a text's end by it."""
    tokenizer, padding = what.adapted.tokenizer, what.adapted.model.config.pad_token_id  # type: ignore[union-attr]
    if tokenizer is None:
        return
    if task_of(what.config).has_head and tokenizer.pad_token is None and padding is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    tokenizer.save_pretrained(out)


def _as_found(model: Any) -> None:
    """Take back what training set: a key-value cache that is off makes those who generate with the model wait."""
    if getattr(model.config, "use_cache", None) is False:
        model.config.use_cache = True


def _for_gguf(what: Export, out: Path) -> list[str]:
    """Write what is merged, with the chat template where llama.cpp's converter of any age looks for it."""
    remarks = write_merged(what, out)
    if what.adapted.tokenizer is not None:
        what.adapted.tokenizer.save_pretrained(out, save_jinja_files=False)
    return remarks


def _peft(what: Export, out: Path) -> list[str]:
    task, base = task_of(what.config), base_of(what.config)
    export_peft(what.adapted.model, out, base_model=base, task_type=task.peft_type, head=what.adapted.beside_base())
    _write_tokenizer(what, out)
    kind = what.config.model.quantize
    remarks = pooling_remark(what.config.model.pooling, what.name), "" if kind == NONE else BESIDE_QUANTISED.format(kind=kind)
    return [remark for remark in remarks if remark]


def _check_merged(config: Config, dtype: str | None) -> None:
    """Anything can be merged into anything."""


def _check_peft(config: Config, dtype: str | None) -> None:
    if dtype is not None:
        raise UserError(f"--dtype {dtype} is for merged weights; an adapter is float32, and goes with a base of any dtype")
    if config.model.kind == "config":
        raise UserError(f"'{config.model.name}' has random weights that lie nowhere, for PEFT to put an adapter on; use --format merged")
    if not SPECS[config.method.adapter].factors:
        raise UserError(f"method={config.method.name} trains no adapter; use --format merged, or head.safetensors in the run's folder")


def _check_gguf(config: Config, dtype: str | None) -> None:
    if task_of(config).has_head:
        raise UserError(f"--format gguf-ready is for language models, and data.task={task_of(config).name} has a head; use --format merged")


LOAD = """from transformers import AutoTokenizer, {auto}

model = {auto}.from_pretrained({out})
tokenizer = AutoTokenizer.from_pretrained({out})"""
LOAD_PEFT = """from peft import PeftModel
from transformers import AutoTokenizer, {auto}

tokenizer = AutoTokenizer.from_pretrained({out})
base = {auto}.from_pretrained({base}, {options}){more}
model = PeftModel.from_pretrained(base, {out})"""
FORMATS: Mapping[str, Format] = {
    "merged": Format(write_merged, "transformers", LOAD, _check_merged),
    "peft": Format(_peft, "peft", LOAD_PEFT, _check_peft),
    "gguf-ready": Format(_for_gguf, "transformers", f"{LOAD}\n\n# {GGUF}", _check_gguf),
}
