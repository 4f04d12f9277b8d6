"""Two workers for all tests of this folder, one of whose operators allows little."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsb.models.content import content_hash
from fedsb.runtime.grid import claim_identity
from tests.resident.workers import TWO, Hand, dealt, worker
from tests.strategies.federations import classification


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSB_HOME", str(tmp_path_factory.mktemp("home")))
        claim_identity()
        yield


@pytest.fixture(scope="session")
def overrides(tiny_bert: Path, tiny_csv: Path) -> list[str]:
    return [*classification(tiny_bert, tiny_csv), *TWO, "method=fed_sb", "init.kind=gradient", "federation.num_rounds=2"]


@pytest.fixture(scope="session")
def data(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return dealt(tmp_path_factory.mktemp("data") / "split", overrides, 2)


@pytest.fixture(scope="session")
def hands(data: dict[str, Path], tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Hand]]:
    """Two workers on one machine, one of them supervised; its operator allows little."""
    folder = tmp_path_factory.mktemp("w")
    models = [{"name": str(tiny_bert), "sha256": content_hash(tiny_bert)}]
    privacy = {"unit": "example", "min_noise": 0.5, "max_epsilon": 60.0}
    strict = {"privacy": privacy, "models": models, "limits": {"max_local_steps": 5000, "max_message_gb": 0.01}}
    said: list[dict[str, Any]] = [{"client": name, "data": {"path": str(path)}, "device": "cpu"} for name, path in sorted(data.items())]
    with worker(folder / "a", said[0]) as free, worker(folder / "b", said[1] | strict, "--supervise") as guarded:
        yield [free, guarded]


@pytest.fixture(scope="session")
def strict(hands: list[Hand]) -> Hand:
    return hands[1]
