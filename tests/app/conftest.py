"""Questions and a tiny model that can learn what most of their answers are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.app.runs import QUICK
from tests.conftest import FILLERS


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> list[str]:
    """Questions to most of which the answer is goal, and a model that does not know it yet."""
    questions = [f"{a} {b}" for a in FILLERS[:6] for b in FILLERS[:6]]
    rows = [{"q": question, "a": "goal" if i % 4 else "bank"} for i, question in enumerate(questions)]
    path = tmp_path_factory.mktemp("asked") / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = ["data=files", f"data.path='{path}'", "data.task=causal_lm", "data.prompt=q", "data.response=a"]
    return [*QUICK, *files, "model=pretrained", f"model.name='{tiny_llama}'", "model.head=lm_head.weight"]
