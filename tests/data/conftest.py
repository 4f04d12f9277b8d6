"""What the data tests share: a configuration to vary, and tables on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fedsb.config.compose import load
from fedsb.config.schema import DataConfig
from fedsb.config.schema_federation import PartitionConfig
from tests.data.own_rows import Configure

Rows = list[dict[str, Any]]


@pytest.fixture(scope="session")
def data_config() -> Callable[..., DataConfig]:
    """``data=files`` as shipped, with fields replaced."""
    base = load(["data=files"]).data
    return lambda **changes: replace(base, **changes)


@pytest.fixture(scope="session")
def partition_config() -> Callable[..., PartitionConfig]:
    """The shipped partition, with fields replaced."""
    base = load().federation.partition
    return lambda **changes: replace(base, **changes)


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., str]:
    """Write rows as JSON lines and return the path."""

    def write(rows: Rows, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="module")
def configured(tiny_bert: Path) -> Configure:
    base = [
        "model=pretrained",
        f"model.name='{tiny_bert}'",
        "data=files",
        "train.max_length=12",
        "device=cpu",
        "data.labels=[film,sport,trade]",
    ]
    return cache(lambda *more: load([*base, "privacy=example", "privacy.noise_multiplier=2", *more]))
