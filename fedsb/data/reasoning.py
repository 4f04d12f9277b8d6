"""Questions with exact answers, which the package reasoning-gym makes: equal rows in every process, without a file or a network."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import Any

from fedsb.config.schema import DataConfig
from fedsb.core.errors import UserError, unknown
from fedsb.data.tables import Table, one_line

PACKAGE = "reasoning_gym"
INSTALL = "pip install --no-deps reasoning-gym==0.1.25"
# Of the package's tasks those whose answer is one short text and the only right one, whose rows follow from their seed (some draw from a
# global generator, or go by the order of a set), and which need no further package; each with the module that makes it.
TASKS: Mapping[str, str] = {
    "aiw": "logic.aiw",
    "base_conversion": "algorithmic.base_conversion",
    "basic_arithmetic": "arithmetic.basic_arithmetic",
    "binary_alternation": "algorithmic.binary_alternation",
    "caesar_cipher": "algorithmic.caesar_cipher",
    "calendar_arithmetic": "arithmetic.calendar_arithmetic",
    "chain_sum": "arithmetic.chain_sum",
    "count_bits": "arithmetic.count_bits",
    "count_primes": "algorithmic.count_primes",
    "course_schedule": "graphs.course_schedule",
    "family_relationships": "graphs.family_relationships",
    "gcd": "arithmetic.gcd",
    "gsm_symbolic": "arithmetic.gsm_symbolic.gsm_symbolic",
    "largest_island": "graphs.largest_island",
    "lcm": "arithmetic.lcm",
    "leg_counting": "arithmetic.leg_counting",
    "letter_counting": "algorithmic.letter_counting",
    "maze": "games.maze",
    "number_sequence": "cognition.number_sequences",
    "products": "arithmetic.products",
    "simple_equations": "algebra.simple_equations",
    "simple_geometry": "geometry.simple_geometry",
    "spell_backward": "algorithmic.spell_backward",
    "string_manipulation": "algorithmic.string_manipulation",
    "syllogism": "logic.syllogisms",
    "word_sequence_reversal": "algorithmic.word_sequence_reversal",
}
TRAIN, TEST = 0, 2**31  # the seed of a task's first row; row i has the seed that is i more
TRIES = 100  # seeds a row before a task is said to have too few questions
COLUMNS = ("prompt", "response", "answer", "task", "text")
_importing = RLock()
Row = tuple[str, str]  # question, answer


def made_rows(cfg: DataConfig) -> tuple[Table, Table]:
    """Make the training and the test rows of the tasks in ``data.tasks``, task by task.

    Rows are those of consecutive seeds, from :data:`TRAIN` and :data:`TEST` on. No two test rows of a task ask the same, and what a test
    row asks no training row asks: a seed that repeats it is passed over.

    Returns:
        Tables with the columns ``prompt``, ``response`` and ``answer`` (both the task's answer), ``task`` (its name) and ``text`` (prompt
        and response).

    Raises:
        UserError: no tasks, one twice or an unknown one, options that it doesn't take, fewer questions than asked for, or no package.
    """
    _check(cfg)
    with _package():
        made = {task: _split(task, cfg) for task in cfg.tasks}
    return _table({task: train for task, (train, _) in made.items()}), _table({task: test for task, (_, test) in made.items()})


def _check(cfg: DataConfig) -> None:
    names = ", ".join(cfg.tasks)
    if not cfg.tasks or len(set(cfg.tasks)) != len(cfg.tasks):
        raise UserError(f"data.tasks=[{names}] must name tasks, each once; choose from {', '.join(sorted(TASKS))}")
    for task in cfg.tasks:
        if task not in TASKS:
            raise unknown("task in data.tasks", task, TASKS)
    for task in cfg.task_options:
        if task not in cfg.tasks:
            raise UserError(
                f"data.task_options.{task}: data.tasks=[{names}] does not name that task; add it there, or leave the options out"
            )


@contextmanager
def _package() -> Iterator[None]:
    """Let a task's module be imported alone: the package's own beginning imports all tasks, and asks for a dozen packages with them.

    Whoever imports the package afterwards gets the whole of it.
    """
    with _importing:
        before = dict.fromkeys(_imported())
        if not before:
            sys.modules |= _bare_packages()
        try:
            yield
        finally:
            for name in [name for name in _imported() if name not in before]:
                del sys.modules[name]


def _bare_packages() -> dict[str, ModuleType]:
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"data=reasoning_gym needs the package reasoning-gym, which is not installed: {INSTALL}")
    root = Path(found.submodule_search_locations[0])
    folders = {module.partition(".")[0] for module in TASKS.values()}
    made = {PACKAGE: ModuleType(PACKAGE), **{f"{PACKAGE}.{folder}": ModuleType(folder) for folder in folders}}
    for name, module in made.items():
        module.__path__ = [str(root.parent.joinpath(*name.split(".")))]
    return made


def _imported() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == PACKAGE]


def _split(task: str, cfg: DataConfig) -> tuple[list[Row], list[Row]]:
    """Return a task's training and test rows."""
    test: dict[str, str] = {}
    for question, answer in _made(task, cfg, TEST, cfg.task_test_rows):
        test.setdefault(question, answer)
        if len(test) == cfg.task_test_rows:
            break
    train = list(islice((row for row in _made(task, cfg, TRAIN, cfg.task_rows) if row[0] not in test), cfg.task_rows))
    if len(test) < cfg.task_test_rows or len(train) < cfg.task_rows:
        raise UserError(
            f"data.tasks: '{task}' has too few different questions for data.task_test_rows={cfg.task_test_rows} that no training row asks; "
            "lower it, or widen the task by data.task_options"
        )
    return train, list(test.items())


def _made(task: str, cfg: DataConfig, seed: int, rows: int) -> Iterator[Row]:
    import_module(f"{PACKAGE}.{TASKS[task]}")
    kinds = import_module(f"{PACKAGE}.factory").DATASETS
    options: Mapping[str, Any] = cfg.task_options.get(task, {})
    try:
        made = kinds[task][0](kinds[task][1](**options, seed=seed, size=rows * TRIES))
    except (AssertionError, TypeError, ValueError) as error:  # what is no field, or has no such value
        known = ", ".join(field.name for field in fields(kinds[task][1]) if field.name not in ("seed", "size"))
        raise UserError(f"data.task_options.{task} is not usable ({one_line(error)}); its options are {known}") from None
    for number in range(rows * TRIES):
        row = made[number]
        yield str(row["question"]).strip(), str(row["answer"])


def _table(rows: Mapping[str, list[Row]]) -> Table:
    flat = [(question, answer, answer, task, f"{question}\n{answer}") for task, pairs in rows.items() for question, answer in pairs]
    return Table(COLUMNS, dict(zip(COLUMNS, zip(*flat, strict=True), strict=True)), len(flat))
