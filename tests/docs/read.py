"""YAML blocks read by the product: what an operator says of a node, or a part of a configuration."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from fedsb.config.compose import load
from fedsb.config.schema import Config
from fedsb.node.file import read_file
from fedsb.node.settings import NodeConfig

OF_A_NODE = {each.name for each in fields(NodeConfig)}
OF_A_RUN = {each.name for each in fields(Config)} | {"defaults"}
LEAST: Mapping[str, Any] = {"client": "client-0", "data": {"path": "rows.csv"}}


def read_yaml(text: str, folder: Path) -> None:
    """Read a block by the reader whose keys it has.

    Raises:
        UserError: it refuses the block.
    """
    said = yaml.safe_load(text)
    if "client" in said or not OF_A_RUN.issuperset(said):
        read_node({**LEAST, **said}, folder)
    else:
        load([f"++{key}={_written(value)}" for key, value in leaves(said)])


def read_node(said: Mapping[str, Any], folder: Path) -> None:
    """Read a ``node.yaml``, beside empty files under all the paths that it names."""
    file = folder / "node.yaml"
    for _, value in leaves(said):
        if isinstance(value, str) and not Path(value).is_absolute() and ("/" in value or "." in value):
            (folder / value).parent.mkdir(parents=True, exist_ok=True)
            (folder / value).touch()
    file.write_text(yaml.safe_dump(dict(said)), encoding="utf-8")
    read_file(file, hashed=False)


def leaves(said: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield values by dotted key."""
    for key, value in said.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{before}{key}.")
        else:
            yield before + key, value


def _written(value: object) -> str:
    return f"'{value}'" if isinstance(value, str) else str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("...\n").strip()


def read_toml(text: str, folder: Path) -> None:
    """Read a block of TOML."""
    tomllib.loads(text)
