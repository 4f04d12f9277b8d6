"""Training over a quantised base is compiled as over a plain one: in one piece, once for all rounds, to the same factors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models.test_backward import hold_two_compiled_rounds
from tests.models.test_quantise import each, quantised


@each
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler, of what it does itself
def test_a_second_round_compiles_nothing_and_trains_alike(tiny_llama: Path, kind: str) -> None:
    torch._dynamo.reset()  # other kinds' code is of the same functions
    hold_two_compiled_rounds(quantised(tiny_llama, kind, dtype="float32"))
