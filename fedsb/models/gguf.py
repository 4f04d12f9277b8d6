"""A model that lies in one GGUF file: laid out once, in float32, in a folder that transformers reads, for all processes of the machine."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fedsb.core.disk import locked, make_folder, reason_of, sync_folder
from fedsb.core.errors import UserError
from fedsb.core.folders import filled_whole, home
from fedsb.core.rng import torch_stream

SUFFIX = ".gguf"
RECIPE = 1  # of what is made of a file: whoever makes something else of it takes the next number, and other folders
WHOLE = ("config.json", "model.safetensors", "tokenizer.json")
ROUNDED = "rounded"  # the key of config.json that says how the file had rounded its weights
PLAIN = ("F32", "F16", "BF16")


def _digit_by_digit() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])


# How a text is split before it is encoded, by the name in the file, where transformers does not know the name and splits as GPT-2 does.
SPLITS: Mapping[str | None, Callable[[], pre_tokenizers.PreTokenizer]] = {"smollm": _digit_by_digit}
LOG = logging.getLogger(__name__)


def unpacked(file: Path) -> Path:
    """Return the folder of a GGUF file's model, ``FEDSB_HOME/models/<sha256 of the file>-<recipe>``, made if it is not there.

    Of several processes one makes it and the others wait. It appears whole: what a killed one has left is removed by the next.

    Args:
        file: holds weights, configuration and tokenizer.

    Raises:
        UserError: the package gguf is not installed, there is no such file or it can't be read, or the disk doesn't take the folder.
    """
    if not file.is_file():
        raise UserError(f"'{file}' is no file; give a {SUFFIX} file, or install the package that holds it again")
    folder = home() / "models" / f"{_sha256(file, file.stat().st_size, file.stat().st_mtime_ns)}-{RECIPE}"
    if not _is_whole(folder):
        with _said(folder, 4 * file.stat().st_size):
            make_folder(folder.parent)
            with locked(folder.with_name(f"{folder.name}.lock")):
                _make(file, folder)
    return folder


def rounding_of(config: Any) -> str:
    """Return what a user should know of a model's weights, by its configuration; empty where nothing has rounded them."""
    rounded = getattr(config, ROUNDED, "")
    if not rounded:
        return ""
    return f"the model's weights were rounded in the file they come from ({rounded}): not quite those published"


@lru_cache(maxsize=8)
def _sha256(file: Path, size: int, time: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in WHOLE)


def _make(file: Path, folder: Path) -> None:
    """Fill the folder, unless another process has done it meanwhile; the lock is held."""
    if _is_whole(folder):
        return
    for torn in folder.parent.glob(f".{folder.name}.*.part"):
        shutil.rmtree(torn, ignore_errors=True)
    LOG.info("unpacking %s into %s, once", file, folder)
    network, tokenizer = _read(file)
    with filled_whole(folder) as scratch:
        network.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for written in scratch.iterdir():
            with written.open("rb") as stream:
                os.fsync(stream.fileno())
    sync_folder(folder.parent)


@contextmanager
def _said(folder: Path, size: int) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the model can't be unpacked into {folder} ({reason_of(error) or error}): it takes some {size / 1e6:,.0f} MB; "
            "make room, or set FEDSB_HOME to another folder"
        ) from None


def _read(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if find_spec("gguf") is None:
        raise UserError(f"'{file.name}' is read by the package gguf, which is not installed: pip install 'fedsb[llm]'")
    from gguf import GGUFReader

    try:
        with torch_stream(0, "gguf"):
            held = GGUFReader(str(file))
            tokenizer = _tokenizer(file, held)
            return _network(file, held, tokenizer), tokenizer
    except Exception as error:  # both packages raise nearly anything at a file that is cut off or of a kind they do not know
        said = " ".join(str(error).split("\n")[0].split())[:200].rstrip(".") or type(error).__name__
        raise UserError(f"'{file}' can't be read as a GGUF model ({said}); get the file again, or name another model") from None


def _network(file: Path, held: Any, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Read the weights into a network of their own: transformers saves none that it has read from such a file."""
    with redirect_stderr(StringIO()):  # its bar asks nobody whether it is wanted
        read = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    ends = {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")}
    for name, value in {**ends, ROUNDED: _rounding(held)}.items():
        setattr(config, name, value)
    with torch.device("meta"):
        network: PreTrainedModel = type(read)(config)
    network.load_state_dict(read.state_dict(), assign=True)
    network.tie_weights()
    network.generation_config = GenerationConfig(**ends)
    return network


def _rounding(held: Any) -> str:
    """Return the kinds of numbers that hold the weights, by share; empty where all are plain ones."""
    counts: Counter[str] = Counter()
    for tensor in held.tensors:
        counts[tensor.tensor_type.name] += int(tensor.n_elements)
    return ", ".join(f"{kind} {count / counts.total():.0%}" for kind, count in counts.most_common() if kind not in PLAIN)


def _tokenizer(file: Path, held: Any) -> PreTrainedTokenizerBase:
    """Read the tokenizer, let it split texts as its merges were learnt, and cut them at the length that the model was trained for."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    split = SPLITS.get(_field(held, "tokenizer.ggml.pre"))
    if split is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = split()
    tokenizer.model_max_length = _field(held, f"{_field(held, 'general.architecture')}.context_length") or tokenizer.model_max_length
    return tokenizer


def _field(held: Any, name: str) -> Any:
    return held.fields[name].contents() if name in held.fields else None
