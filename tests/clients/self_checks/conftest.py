"""A model to plant faults in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.private_cases import Case, build_case


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Case:
    return build_case(tiny_bert, "classification", "lora")


@pytest.fixture
def case(built: Case) -> Iterator[Case]:
    """A model that may be broken, and is whole again afterwards."""
    yield built
    for layer in built.adapted.layers.values():
        vars(layer).pop("forward", None)
        for part in (layer, layer.A, layer.B):
            part._forward_hooks.clear()
            part._forward_pre_hooks.clear()
    for p in built.adapted.model.parameters():
        p.requires_grad_(any(p is q for q in built.adapted.trainable().values()))
