"""Hands a model over to lm-eval, EleutherAI's evaluation harness: it has the tasks that others' figures are of."""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedsb.app.exports.on_request import merged_for
from fedsb.app.finished import is_run
from fedsb.core.errors import UserError

PACKAGE = "lm_eval"
KEYS = ("tasks", "limit", "num_fewshot", "batch_size")


def harness(folder: Path, said: str) -> str:
    """Let lm-eval score a run's merged model, or an exported one, and return its table.

    Args:
        folder: of the run or the model.
        said: ``tasks=arc_easy,hellaswag``, and perhaps ``limit=100``, ``num_fewshot=5``, ``batch_size=8`` after a semicolon.

    Raises:
        UserError: lm-eval is not installed, or no tasks are named.
    """
    options = _options(said)
    if find_spec(PACKAGE) is None:
        raise UserError("--lm-eval needs the package lm-eval, which is not installed: pip install 'lm-eval[hf]'")
    place: AbstractContextManager[str] = tempfile.TemporaryDirectory(prefix="fedsb-") if is_run(folder) else nullcontext(str(folder))
    with place as home:
        model = merged_for(folder, Path(home)) if is_run(folder) else folder
        found = import_module(PACKAGE).simple_evaluate(model="hf", model_args={"pretrained": str(model)}, **options)
    return str(import_module(f"{PACKAGE}.utils").make_table(found))


def _options(said: str) -> dict[str, Any]:
    pairs = [part.partition("=") for part in said.split(";")]
    for key, _, value in pairs:
        if key not in KEYS or not value or (key != "tasks" and not value.isdecimal()):
            raise UserError(f"--lm-eval '{said}' is not understood; write tasks=NAME,NAME, and after a semicolon {', '.join(KEYS[1:])}=N")
    found = {key: value.split(",") if key == "tasks" else int(value) for key, _, value in pairs}
    if "tasks" not in found:
        raise UserError(f"--lm-eval '{said}' names no tasks; write tasks=NAME,NAME")
    return found
