"""Hands a model over to lm-eval, EleutherAI's evaluation harness: it has the tasks that others' figures are of."""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from fedsb.app.exports.on_request import merged_for
from fedsb.app.finished import is_run
from fedsb.core.errors import UserError
from fedsb.models.loading import resolve_device

PACKAGE = "lm_eval"
KEYS = ("tasks", "limit", "num_fewshot", "batch_size")


def harness(folder: Path, said: str) -> str:
    """Let lm-eval score a run's merged model, or an exported one, and return its table.

    Args:
        folder: of the run or the model.
        said: ``tasks=arc_easy,hellaswag``, and perhaps ``limit=100``, ``num_fewshot=5``, ``batch_size=8`` after a semicolon. A task that
            ends in ``.yaml`` is a file of the user's own, as lm-eval's are written, without ``include`` and ``!function``.

    Raises:
        UserError: lm-eval is not installed, no tasks are named, or the file of one can't be read.
    """
    options = _options(said)
    if find_spec(PACKAGE) is None:
        raise UserError("--lm-eval needs the package lm-eval, which is not installed: pip install 'lm-eval[hf]'")
    place: AbstractContextManager[str] = tempfile.TemporaryDirectory(prefix="fedsb-") if is_run(folder) else nullcontext(str(folder))
    with place as home:
        model = merged_for(folder, Path(home)) if is_run(folder) else folder
        # Of itself lm-eval takes a GPU, whether there is one or not.
        where = resolve_device("auto")
        found = import_module(PACKAGE).simple_evaluate(model="hf", model_args={"pretrained": str(model)}, device=where, **options)
    return str(import_module(f"{PACKAGE}.utils").make_table(found))


def _options(said: str) -> dict[str, Any]:
    pairs = [part.partition("=") for part in said.split(";")]
    for key, _, value in pairs:
        if key not in KEYS or not value or (key != "tasks" and not value.isdecimal()):
            raise UserError(f"--lm-eval '{said}' is not understood; write tasks=NAME,NAME, and after a semicolon {', '.join(KEYS[1:])}=N")
    found = {key: [_task(name) for name in value.split(",")] if key == "tasks" else int(value) for key, _, value in pairs}
    if "tasks" not in found:
        raise UserError(f"--lm-eval '{said}' names no tasks; write tasks=NAME,NAME")
    return found


def _task(name: str) -> Any:
    """Return the name of one of lm-eval's tasks, or what the file of another says."""
    if not name.endswith(".yaml"):
        return name
    try:
        said = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--lm-eval tasks={name}: {' '.join(str(error).split())[:120]}") from None
    if not isinstance(said, dict) or "task" not in said or "include" in said:
        raise UserError(f"--lm-eval tasks={name}: that file is no task of lm-eval's by itself, which has task: NAME, and no include")
    return said
