"""A model, and privacy for its examples."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsb.config.compose import load
from fedsb.config.schema import PrivacyConfig
from tests.clients.private_cases import Case, build_case


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Case:
    return build_case(tiny_bert, "classification", "lora_sb", "weight_svd")


@pytest.fixture(scope="module")
def privacy() -> PrivacyConfig:
    return load(["privacy=example", "privacy.epsilon=3"]).privacy
