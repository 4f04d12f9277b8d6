"""Nodes of operators' own: with another model, named on both sides; some of them a round, by their names; and with a start by sketch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from fedsb.core.cohort import draw_cohort
from fedsb.models.content import content_hash
from fedsb.privacy.codes import CODES
from tests.conftest import encoder_tokenizer, save
from tests.strategies.privacy.test_node_files import node_file
from tests.strategies.private_runs import run_privately, small


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))


def shallow(folder: Path) -> Path:
    """Leave a model of one layer, where that of the run has more."""
    tokenizer = encoder_tokenizer()
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=48, pad_token_id=tokenizer.pad_token_id, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return save(BertModel(config), tokenizer, folder)


def test_a_node_with_another_model_is_named_on_both_sides_and_the_others_go_on(
    tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = shallow(tmp_path / "other")
    model = {"name": str(tiny_bert), "sha256": content_hash(other), "path": str(other)}
    nodes = {1: node_file(tmp_path, "a"), 2: node_file(tmp_path, "b", models=[model])}
    few = ("federation.num_clients=2", "federation.names=[a,b]", "federation.min_replies=1")
    done = run_privately(small(tiny_bert, tmp_path, *few), tmp_path / "run", nodes=nodes)
    assert done.error is None
    assert [record.failed for record in done.records[1:]] == [{"b": CODES["layout"].text}] * 2
    at_node = [line for line in caplog.text.splitlines() if "no reply to 'train'" in line]
    assert len(at_node) == 2
    assert all(
        re.search(r"client 'b' .*: group '\w+' holds \d+ values, expected \d+, of .*; model, adapter.targets and rank must", line)
        for line in at_node
    )
    assert "Traceback" not in caplog.text


def test_some_nodes_a_round_are_asked_by_their_operators_names_with_a_start_by_sketch(tiny_bert: Path, tmp_path: Path) -> None:
    """Whatever numbers Flower has given them; to the same bits."""
    names = ("ward-7", "ward-8", "ward-9", "ward-10")
    run = (f"federation.names=[{','.join(names)}]", "federation.fraction=0.5", "init.kind=gradient", "init.num_examples=8")
    files = [node_file(tmp_path, name) for name in names]
    first, second = (
        run_privately(small(tiny_bert, tmp_path, *run), tmp_path / kind, nodes=dict(zip(numbers, files, strict=True)))
        for kind, numbers in (("one", (1, 2, 3, 4)), ("other", (77, 3, 901, 12)))
    )
    assert (first.error, second.error) == (None, None)
    drawn = [sorted(draw_cohort(names, 2, seed=0, round_number=number)) for number in (1, 2)]
    for done in (first, second):
        assert [sorted(record.clients) for record in done.records[1:]] == drawn
    assert first.sha256 == second.sha256
