"""What is wrong with a configuration, in one line: errors of Hydra, OmegaConf and pydantic with the nearest valid name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import get_type_hints

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fedsb.config.schema import Config
from fedsb.core.errors import UserError, nearest, unknown
from fedsb.core.folders import conf_dir

SAID = {"tuple_type": "it must be a list, as in [a,b]"}  # what pydantic says of Python's types, for those who write none


def explained_value(error: ValidationError) -> UserError:
    """Say the first type error in one line."""
    first = error.errors()[0]
    key = _key(first)
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return _unknown_key(key)
    if first["type"] == "missing" and isinstance(first["loc"][-1], int):
        return UserError(f"{key.rpartition('.')[0]} must have more values than {first['loc'][-1]}")
    if first["type"] == "missing":
        return UserError(f"{key} must be given: add {key}=…")
    # One error a kind of value that the key may have: a number, or a word.
    said = dict.fromkeys(SAID.get(e["type"], e["msg"][0].lower() + e["msg"][1:]) for e in error.errors() if _key(e) == key)
    return UserError(f"{key}={first['input']} is not valid: {'; or '.join(said)}")


def _key(error: ErrorDetails) -> str:
    """Return the dotted key of a type error, without the kinds of value that pydantic has tried."""
    kinds, made = ("str", "int", "float", "bool"), ("function", "tuple[", "literal[")
    return ".".join(part for part in map(str, error["loc"]) if part not in kinds and not part.startswith(made))


def explained(error: Exception, overrides: Sequence[str]) -> UserError:
    """Say a Hydra or OmegaConf error in one line, with the nearest valid name."""
    text = " ".join(str(error).split())
    if found := re.search(r"Could not find '([\w/]+)/([^'/]+)'", text):
        group, option = found.groups()
        options = [path.stem for path in (conf_dir() / group).glob("*.yaml")]
        return unknown(group, option, options) if options else UserError(f"unknown configuration group '{group}'{nearest(group, groups())}")
    if found := re.search(r"Could not (?:override|append to config|delete from config).*?'([^']+)'", text):
        return _unknown_key(found.group(1).split("=")[0].lstrip("+~"))
    key = re.search(r"full_key: (\S+)", text)
    if found := re.search(r"Missing mandatory value: (\S+)", text):
        missing = (key or found).group(1)
        return UserError(f"{missing} must be given: add {missing}=…")
    return UserError(f"{key.group(1) + ': ' if key else ''}{text.split(' full_key:')[0]}")


def _unknown_key(key: str) -> UserError:
    keys = known_keys()
    if key in keys:
        return UserError(f"'{key}' is not in the chosen {key.partition('.')[0]} file; add it with a plus: +{key}=…")
    leaves = {k.rsplit(".", 1)[-1]: k for k in keys}
    leaf = nearest(key.rsplit(".", 1)[-1], leaves)
    hint = nearest(key, [*keys, *groups()]) or leaf
    siblings = [k for k in keys if k.rpartition(".")[0] == key.rpartition(".")[0]]
    allowed = ", ".join(siblings or groups())
    return UserError(f"unknown key '{key}'{hint}; known here: {allowed}")


def known_keys(of: type = Config) -> list[str]:
    """Return every dotted key of the configuration, or of another tree of dataclasses."""

    def walk(cls: type, prefix: str) -> list[str]:
        keys: list[str] = []
        for name, kind in get_type_hints(cls).items():
            if name.startswith("__"):
                continue
            nested = isinstance(kind, type) and dataclasses.is_dataclass(kind)
            keys += walk(kind, f"{prefix}{name}.") if nested else [f"{prefix}{name}"]
        return keys

    return sorted(walk(of, ""))


def groups() -> list[str]:
    """Return the names of the configuration groups."""
    return sorted(path.name for path in conf_dir().iterdir() if path.is_dir())
