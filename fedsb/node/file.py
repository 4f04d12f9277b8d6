"""``node.yaml``: read, typed, and held against what there is on this machine."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from fedsb.config.explaining import known_keys
from fedsb.config.plain_yaml import read_yaml
from fedsb.core.errors import UserError, nearest
from fedsb.node.settings import PACKAGE, NodeConfig, OwnModel
from fedsb.node.values import NodeConfigError, hold

_KIND = re.compile(r"(str|int|float|bool|dict|tuple|function|nullable)\b.*")  # what pydantic puts into a place beside keys


def read_file(path: Path, *, hashed: bool = True) -> NodeConfig:
    """Read ``node.yaml``; relative paths in it are below its own folder.

    Args:
        path: of the file.
        hashed: whether each model must have its hash; ``fedsb node check`` prints those that are missing.

    Raises:
        NodeConfigError: it is not there, is no YAML, has an unknown key, a value that cannot be used, or names what is not there.
    """
    node = _read(path, _version(path))
    _hold_there(node, path)
    if hashed and (bare := next((model.name for model in node.models or () if model.sha256 is None), None)):
        raise NodeConfigError(f"models in {path}: '{bare}' has no sha256; `fedsb node check {path}` prints it", key="models")
    return node


def said_in(path: Path) -> dict[str, Any]:
    """Return what a file holds, unchecked.

    Raises:
        NodeConfigError: it is not there, or holds no keys.
    """
    _version(path)
    try:
        found = read_yaml(path)
    except UserError as error:
        raise NodeConfigError(str(error), key="file") from None
    if not found:
        raise NodeConfigError(f"'{path}' holds no keys; it needs client: and data: at least", key="file")
    return found


def _version(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise NodeConfigError(f"'{path}' can't be read ({(error.strerror or '').lower()}); name the node's own file", key="file") from None
    return stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=8)
def _read(path: Path, version: tuple[int, int]) -> NodeConfig:
    """Read a file once while it stays as it is: a message asks for it several times."""
    try:
        node = TypeAdapter(NodeConfig).validate_json(json.dumps(said_in(path), default=str), strict=True)
    except ValidationError as error:
        raise _explained(path, error.errors()) from None
    hold({key: value for key, value in leaves(node) if value is not None}, f"in {path}")
    return _placed(node, path.parent)


def leaves(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a tree of dataclasses by dotted key."""
    for each in fields(group):
        value = getattr(group, each.name)
        if is_dataclass(value):
            yield from leaves(value, f"{before}{each.name}.")
        else:
            yield before + each.name, value


def _explained(path: Path, errors: Sequence[ErrorDetails]) -> NodeConfigError:
    """Say the first error of types in one line."""
    strange = [each for each in errors if each["type"] in ("unexpected_keyword_argument", "extra_forbidden")]
    first = (strange or list(errors))[0]  # a key that is misspelt is missing too
    key = _key(first)
    if strange:
        beside = _beside(key.rpartition(".")[0])
        line = f"unknown key '{key}' in {path}{nearest(key.rpartition('.')[2], beside)}; known here: {', '.join(beside)}"
        return NodeConfigError(line)
    if first["type"] == "missing":
        return NodeConfigError(f"{key} is missing in {path}; add it", key=key)
    # One error a kind of value that the key may have.
    said = dict.fromkeys(each["msg"][0].lower() + each["msg"][1:] for each in errors if _key(each) == key)
    return NodeConfigError(f"{key}={first['input']!r} in {path} is not valid: {'; or '.join(said)}", key=key.partition(".0")[0])


def _key(error: ErrorDetails) -> str:
    return ".".join(part for part in map(str, error["loc"]) if not _KIND.fullmatch(part))


def _beside(group: str) -> list[str]:
    """Return the keys of a group."""
    if re.fullmatch(r"models\.\d+", group):
        return [each.name for each in fields(OwnModel)]
    before = f"{group}." if group else ""
    return sorted({each.removeprefix(before).partition(".")[0] for each in known_keys(NodeConfig) if each.startswith(before)})


def _placed(node: NodeConfig, folder: Path) -> NodeConfig:
    """Take relative paths from the file's own folder."""

    def placed(path: str) -> str:
        return os.path.normpath(folder / Path(path).expanduser())

    own = node.data
    data = own if own.path == PACKAGE else replace(own, path=placed(own.path), test_path=own.test_path and placed(own.test_path))
    models = node.models and tuple(replace(model, path=model.path and placed(model.path)) for model in node.models)
    key, peers = (path and placed(path) for path in (node.secure.key, node.secure.peers))
    secure, cache = replace(node.secure, key=key, peers=peers), replace(node.cache, folder=node.cache.folder and placed(node.cache.folder))
    return replace(node, data=data, models=models, secure=secure, cache=cache)


def _hold_there(node: NodeConfig, path: Path) -> None:
    if node.data_path is None and node.data.test_path is not None:
        line = f"data.test_path in {path}: a node whose data ship in a package reads no file; leave it out, or use data.test_fraction"
        raise NodeConfigError(line, key="data.test_path")
    named = {
        "data.path": node.data_path,
        "data.test_path": node.data.test_path,
        "secure.key": node.secure.key,
        "secure.peers": node.secure.peers,
        **{f"models '{model.name}'": model.path for model in node.models or ()},
    }
    for key, place in named.items():
        if place is not None and not Path(place).exists():
            line = f"{key} in {path}: '{place}' is not there; correct it, or bring the file back"
            raise NodeConfigError(line, key=key.partition(" ")[0])
