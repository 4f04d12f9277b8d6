"""Logits made at the places that are learnt are those of a whole pass there, and so are the loss, its gradients and what is measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsb.models.adapted import AdaptedModel
from fedsb.models.collating import collate, collate_packed
from fedsb.tasks.logits import logits_at
from fedsb.tasks.task import IGNORED, TASKS
from tests.architectures import LANGUAGE_MODELS, checkpoint
from tests.models.test_backward import learnt
from tests.models.test_narrow import built

WORDS = TASKS["causal_lm"]
ROWS = [*learnt("causal_lm", 5), {"input_ids": [5, 6, 7], "target": 0, "learnt": [0, 0, 0]}]
COUNT = sum(sum(row["learnt"][1:]) for row in ROWS)


@pytest.fixture(params=LANGUAGE_MODELS)
def adapted(request: pytest.FixtureRequest, tmp_path: Path) -> AdaptedModel:
    return built(checkpoint(request.param, tmp_path), "causal_lm", dtype="float32")


def found(adapted: AdaptedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the outputs, what is recorded of them, and the loss with its gradients."""
    outputs = WORDS.forward(adapted.model, batch)
    loss = WORDS.loss(outputs, batch)
    gradients = torch.autograd.grad(loss, list(adapted.trainable().values()), allow_unused=True)
    return outputs, WORDS.record(outputs, batch), [loss.detach(), *(g for g in gradients if g is not None)]


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_loss_its_gradients_and_the_records_are_those_of_a_whole_pass(adapted: AdaptedModel) -> None:
    whole, narrowed = collate(ROWS, adapted, WORDS), collate(ROWS, adapted, WORDS, narrowed=True)
    ours, theirs = found(adapted, narrowed), found(adapted, whole)
    assert ours[0].shape == (COUNT, theirs[0].shape[-1])
    same([ours[0]], [theirs[0].flatten(0, 1)[narrowed["places"]]])
    same([ours[1]], [theirs[1]])
    same(ours[2], theirs[2])


def test_the_projection_is_given_these_places_and_no_others(tiny_llama: Path) -> None:
    model: Any = built(tiny_llama, "causal_lm", dtype="float32")
    seen: list[int] = []
    model.model.get_output_embeddings().register_forward_hook(lambda _, given, __: seen.append(given[0].shape[:-1].numel()))
    batch = collate(ROWS, model, WORDS, narrowed=True)
    WORDS.forward(model.model, batch)
    WORDS.forward(model.model, collate(ROWS, model, WORDS))
    assert seen == [COUNT, batch["input_ids"].numel()]  # and a whole pass behind it is whole again


def test_packed_rows_too(tiny_llama: Path) -> None:
    model = built(tiny_llama, "causal_lm", dtype="float32")
    ours, theirs = (found(model, collate_packed(ROWS, model, WORDS, 24, narrowed=narrowed)) for narrowed in (True, False))
    assert len(ours[0]) == COUNT
    same(ours[2], theirs[2])


def test_a_batch_that_teaches_nothing_has_no_loss_and_no_gradient(tiny_llama: Path) -> None:
    model = built(tiny_llama, "causal_lm", dtype="float32")
    outputs, records, (loss, *gradients) = found(model, collate(ROWS[-1:] * 2, model, WORDS, narrowed=True))
    assert (len(outputs), float(loss), records.tolist()) == (0, 0.0, [[0.0, 0.0]] * 2)
    assert gradients
    assert not any(g.any() for g in gradients)


class ByItself(nn.Module):
    """A model that multiplies by its embedding, without a call of it."""

    def __init__(self, projection: nn.Linear | None) -> None:
        super().__init__()
        self.embedding, self.projection = nn.Embedding(9, 4), projection

    def get_output_embeddings(self) -> nn.Linear | None:
        return self.projection

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.embedding(input_ids) @ self.embedding.weight.T)


@pytest.mark.parametrize("projection", [None, nn.Linear(4, 9)], ids=["none", "one that is not called"])
def test_a_model_that_calls_no_projection_gives_the_same(projection: nn.Linear | None) -> None:
    model, ids, places = ByItself(projection), torch.arange(8).view(2, 4), torch.tensor([1, 6])
    assert torch.equal(logits_at(places, model, {"input_ids": ids}), model(ids).logits.flatten(0, 1)[places])


def test_the_places_are_where_a_learnt_token_follows() -> None:
    batch = {"input_ids": torch.arange(12).view(2, 6), "learnt": torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1]])}
    assert WORDS.places(batch).tolist() == [1, 2, 10]  # type: ignore[union-attr]
    assert IGNORED not in batch["input_ids"]
