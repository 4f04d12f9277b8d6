"""Conv1D, grouped queries and tied embeddings through every strategy: rounds move what is foretold, and what is tied stays one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsb.core.state import HEAD
from tests.architectures import checkpoint
from tests.strategies.federations import federate, language_model, mean_update, next_instructions
from tests.strategies.rounds import FAMILIES, METHODS, ROUNDS, WHOLE, foretold, undrawn

# By name what is trained beside the factors: the one matrix that embeds words and projects onto them.
TIED = {"gpt2": "transformer.wte.weight", "llama": "model.embed_tokens.weight"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=pytest.mark.slow), "llama"])
def test_a_trained_embedding_that_is_the_projection_too_is_averaged_and_stays_one(
    name: str, method: str, tiny_csv: Path, tmp_path: Path
) -> None:
    model = checkpoint(name, tmp_path / name, tie_word_embeddings=True)
    few = [f"federation.num_rounds={max(2, FAMILIES[method].turns)}", f"model.head={TIED[name]}", "train.local_steps=1"]
    federation = federate([*METHODS[method], *language_model(model, tiny_csv), *ROUNDS, *few])
    assert not any(record.failed for record in federation.records)
    assert undrawn(federation) == foretold(federation)
    network = federation.prepared.adapted.model
    assert network.get_input_embeddings().weight is network.get_output_embeddings().weight
    if method not in WHOLE:
        return
    exchanges, during, after = next(next_instructions(federation, tmp_path / "caches"))
    _, head = mean_update(federation, exchanges, during.basis.merge(during.state))
    (wanted,) = head.values()
    first = next(iter(federation.prepared.initial.pick(HEAD).values()))
    assert not torch.equal(wanted.float(), first)
    for held in after:
        (kept,) = held.head.values()
        assert torch.allclose(kept.double(), wanted, rtol=1e-6, atol=1e-7)
