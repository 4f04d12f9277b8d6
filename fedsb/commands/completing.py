"""What may stand where a shell wants a word completed: commands, flags, their values, overrides, folders of runs.

A person waits at each tab, so that nothing here imports torch or composes a configuration; ``conf/`` and folders are read as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from fedsb.commands.flags import FLAGS, flag_of, names_of, parsed
from fedsb.core.errors import UserError
from fedsb.core.folders import ROOT_CONFIG, conf_dir, home
from fedsb.runtime.flower_config import config_file, connections, names_in

Words = Sequence[str]
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
SHELLS = ("bash", "zsh", "fish")
HELP = ("-h", "--help")
PLAIN = re.compile(r"[\w./:@%+,=~-]+")  # a shell takes such a word as it stands
RECORDS, JOBS = "metrics.jsonl", "jobs.jsonl"  # of a run; of a sweep
GLOBAL = "# @package _global_"  # a file of a group that sets keys of others


def candidates(words: Words) -> list[str]:
    """Return what the last word may become, sorted; whole words, or up to a ``=``, ``.`` or ``/`` behind which they go on.

    Args:
        words: of the command line behind ``fedsb``; the last one is being written, and may be empty.
    """
    *before, word = words or ("",)
    found = set(_following(before, word) if before else {*AFTER, *HELP, "--version"})
    return sorted(each for each in found if each.startswith(word) and PLAIN.fullmatch(each))


def _following(before: Words, word: str) -> Iterable[str]:
    command, *rest = before
    if command not in AFTER:
        return ()
    table = f"{command} {rest[0]}" if rest and f"{command} {rest[0]}" in FLAGS else command
    flag = flag_of(table, rest[-1]) if rest else None
    if flag and flag.needs_value:
        return flag.choices
    if word.startswith("-"):
        return _of_flags(table, word)
    others = [each.texts[0] for each in parsed(table, rest) if not each.flag]
    return [*AFTER[command](others, word), *(flag.choices if flag else ())]


def _of_flags(table: str, word: str) -> Iterator[str]:
    name, equals, _ = word.partition("=")
    if not equals:
        yield from (*names_of(table), *HELP)
    elif flag := flag_of(table, name):
        yield from (f"{name}={choice}" for choice in flag.choices)


def _overrides(before: Words, word: str) -> Iterator[str]:
    """Yield names of groups and keys, of a key up to its next dot; behind ``=`` options of a group, or what else a value may be."""
    sign = word[: len(word) - len(word.lstrip("+~"))]
    key, equals, value = word[len(sign) :].partition("=")
    if equals:
        listed = value[: value.rfind(",") + 1]  # of a sweep
        yield from (f"{sign}{key}={listed}{each}" for each in _values(key))
        return
    yield from (f"{sign}{group}=" for group in _groups())
    for each in _defaults():
        end = each.find(".", len(key))
        yield f"{sign}{each}=" if end < 0 else f"{sign}{each[: end + 1]}"


def _values(key: str) -> Iterable[str]:
    if key in _groups():
        return _groups()[key]
    if key == "resume":
        return [str(folder) for folder in _runs() if not (folder / "summary.json").exists()]
    return ("true", "false") if isinstance(_defaults().get(key), bool) else ()


@cache
def _groups() -> Mapping[str, list[str]]:
    return {folder.name: options for folder in conf_dir().iterdir() if (options := [path.stem for path in folder.glob("*.yaml")])}


@cache
def _defaults() -> Mapping[str, Any]:
    """Return the keys of all files of ``conf/`` but experiments, each with a value that one of them gives it."""
    files = [conf_dir() / f"{ROOT_CONFIG}.yaml", *(path for path in conf_dir().glob("*/*.yaml") if path.parent.name != "experiment")]
    return {key: value for path in files for key, value in _keys_of(path)}


def _keys_of(path: Path) -> Iterator[tuple[str, Any]]:
    text = path.read_text(encoding="utf-8")
    own = path.parent == conf_dir() or GLOBAL in text
    tree = {key: value for key, value in yaml.load(text, Loader).items() if key not in ("defaults", "hydra")}
    return _leaves(tree, "" if own else f"{path.parent.name}.")


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _runs() -> Iterator[Path]:
    """Yield folders of runs, and of sweeps and their jobs, where runs lie that were told no other place: here, and in FEDSB_HOME."""
    here = Path()
    days = [day for kind in ("outputs", "multirun") for day in _below(here / kind)]
    places = [here, *days]
    with suppress(UserError):
        places.append(home() / "runs")
    for folder in (folder for place in places for folder in _below(place)):
        if (folder / RECORDS).is_file():
            yield folder
        elif (folder / JOBS).is_file():
            yield from (folder, *(job for job in _below(folder) if (job / RECORDS).is_file()))


def _below(folder: Path) -> list[Path]:
    try:
        return [each for each in folder.iterdir() if each.is_dir()]
    except OSError:
        return []


def _federation(before: Words, word: str) -> Iterable[str]:
    if before:
        return _overrides(before, word)
    with suppress(UserError, RuntimeError):
        return [*names_in(connections(config_file())), *_overrides(before, word)]
    return _overrides(before, word)


def _folders(before: Words, word: str) -> Iterable[str]:
    return map(str, _runs())


def _measured(before: Words, word: str) -> Iterable[str]:
    return _overrides(before, word) if before else _folders(before, word)


def _node(before: Words, word: str) -> Iterable[str]:
    return ("check",) if not before else _overrides(before, word) if len(before) > 1 else ()


def _sides(before: Words, word: str) -> Iterable[str]:
    return () if before else (name.partition(" ")[2] for name in FLAGS if name.startswith("federation "))


def _nothing(before: Words, word: str) -> Iterable[str]:
    return ()


# What may follow a command, beside its flags: of the words before, without flags, and the one that is being written.
AFTER: Mapping[str, Callable[[Words, str], Iterable[str]]] = {
    "run": _overrides,
    "submit": _federation,
    "cost": _overrides,
    "watch": _folders,
    "report": _folders,
    "eval": _measured,
    "export": _folders,
    "node": _node,
    "worker": _nothing,
    "federation": _sides,
    "doctor": _nothing,
    "completion": lambda before, word: () if before else SHELLS,
}
