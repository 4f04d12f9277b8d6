"""The demonstration of a language model, on a tiny one: rounds, and two questions with both answers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from scripts.demo_llm import main


@pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")
def test_two_questions_are_answered_before_and_after(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["model=pretrained", f"model.name='{tiny_llama}'", "rank=2", "device=cpu", "runtime.threads=1", "eval.max_new_tokens=4"]
    few = ["data.tasks=[chain_sum,gcd,products]", "data.task_rows=8", "data.task_test_rows=3", "train.local_steps=1", "train.max_length=44"]
    assert main([*small, *few, "federation.num_rounds=1"]) == 0
    out = capsys.readouterr().out
    rounds = [line for line in out.splitlines() if line.startswith("round ")]
    assert [("exact_match" in line, "chance" in line) for line in rounds] == [(True, True)] * 2
    _, *shown = out.partition("run folder:")[2].split("\n\n")
    assert len(shown) == 2
    for question in shown:
        lines = [line for line in question.strip().splitlines() if line.startswith("  ")]
        assert [line.partition(":")[0] for line in lines] == ["  the answer", "  untouched base", "  fed_sb, round 1"]
        assert all(line.endswith(("[right]", "[wrong]")) for line in lines[1:])


def test_a_mistake_ends_it_as_it_ends_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    from fedsb.core.errors import UserError

    with pytest.raises(UserError, match=r"unknown key 'federation.rounds'"):
        main(["federation.rounds=2"])
