"""Losses against slow loops, metrics against scikit-learn and SciPy, evaluation against one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clients import give_evidence
from fedsb.adapters.starts import Sketch
from fedsb.config.compose import load
from fedsb.core.rng import numpy_generator, torch_generator
from fedsb.core.state import State, squared_norm, subtract
from fedsb.models.adapted import AdaptedModel
from fedsb.models.build import build_model
from fedsb.models.evaluate import evaluate
from fedsb.tasks.task import TASKS

law = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32)
CLASSIFICATION, REGRESSION, LANGUAGE = TASKS["classification"], TASKS["regression"], TASKS["causal_lm"]


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(seed, "test"))


@law
@given(st.integers(1, 40), st.integers(2, 5), seeds)
def test_classification_metrics_are_those_of_scikit_learn(count: int, classes: int, seed: int) -> None:
    logits = gaussian(count, classes, seed=seed)
    truth = torch.from_numpy(numpy_generator(seed, "test").integers(0, classes, count))
    guess = logits.argmax(-1)
    found = CLASSIFICATION.metrics(logits, truth)
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, guess))
    assert found["macro_f1"] == pytest.approx(f1_score(truth, guess, average="macro", zero_division=0.0))
    one_class = len(set(truth.tolist()) | set(guess.tolist())) == 1
    assert found["matthews"] == pytest.approx(0.0 if one_class else matthews_corrcoef(truth, guess))
    slow = -sum(float(torch.log_softmax(row.double(), 0)[label]) for row, label in zip(logits, truth, strict=True)) / count
    assert float(CLASSIFICATION.loss(logits, {"targets": truth})) == pytest.approx(slow, rel=1e-5)


@law
@given(st.integers(3, 40), seeds, st.booleans())
def test_regression_metrics_are_those_of_scipy(count: int, seed: int, ties: bool) -> None:
    guess, truth = gaussian(count, 1, seed=seed), gaussian(count, seed=seed + 1)
    if ties:
        guess, truth = (4 * guess).round() / 4, (2 * truth).round() / 2
        guess[0], guess[1], truth[0], truth[1] = 0.0, 1.0, 0.0, 1.0  # constant columns have no correlation
    found = REGRESSION.metrics(guess, truth)
    pairs = guess.squeeze(-1).double().numpy(), truth.double().numpy()
    assert found["pearson"] == pytest.approx(pearsonr(*pairs).statistic, abs=1e-9)
    assert found["spearman"] == pytest.approx(spearmanr(*pairs).statistic, abs=1e-9)
    assert found["mse"] == pytest.approx(float(np.mean((pairs[0] - pairs[1]) ** 2)))
    assert float(REGRESSION.loss(guess, {"targets": truth})) == pytest.approx(found["mse"], rel=1e-5)


def test_a_constant_guess_has_no_correlation() -> None:
    found = REGRESSION.metrics(torch.ones(4, 1), torch.arange(4.0))
    assert (found["pearson"], found["spearman"]) == (0.0, 0.0)


def padded(lengths: list[int], seed: int, vocabulary: int = 7) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits and a batch of the given lengths, padded on the right with a real token's id."""
    longest = max(lengths)
    tokens = torch.from_numpy(numpy_generator(seed, "test").integers(0, vocabulary, (len(lengths), longest)))
    mask = torch.tensor([[1] * n + [0] * (longest - n) for n in lengths])
    return gaussian(len(lengths), longest, vocabulary, seed=seed), {"input_ids": tokens * mask, "attention_mask": mask}


def slow_nll(logits: Tensor, batch: dict[str, Tensor]) -> list[list[float]]:
    """Return the negative log-likelihood of each predicted token, text by text."""
    found = []
    for row, tokens, mask in zip(logits.double(), batch["input_ids"], batch["attention_mask"], strict=True):
        length = int(mask.sum())
        found.append([-float(torch.log_softmax(row[t], 0)[tokens[t + 1]]) for t in range(length - 1)])
    return found


@law
@given(st.lists(st.integers(1, 8), min_size=1, max_size=5).filter(lambda lengths: max(lengths) > 1), seeds)
def test_the_loss_of_a_language_model_is_that_of_a_slow_loop(lengths: list[int], seed: int) -> None:
    logits, batch = padded(lengths, seed)
    nll = slow_nll(logits, batch)
    tokens = [value for row in nll for value in row]
    assert float(LANGUAGE.loss(logits, batch)) == pytest.approx(sum(tokens) / len(tokens), rel=1e-5)
    records = LANGUAGE.record(logits, batch)
    assert records[:, 1].tolist() == [len(row) for row in nll]
    assert records[:, 0].tolist() == pytest.approx([sum(row) for row in nll], rel=1e-5)
    metrics = LANGUAGE.metrics(records, None)
    assert metrics["loss"] == pytest.approx(sum(tokens) / len(tokens), rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(float(np.exp(sum(tokens) / len(tokens))), rel=1e-5)


@pytest.mark.parametrize("lengths", [[1], [1, 1]])
def test_texts_of_one_token_predict_nothing_and_break_nothing(lengths: list[int]) -> None:
    logits, batch = padded(lengths, 0)
    logits = torch.nn.functional.pad(logits, (0, 0, 0, 1)).requires_grad_()
    batch = {key: torch.nn.functional.pad(value, (0, 1)) for key, value in batch.items()}
    loss = LANGUAGE.loss(logits, batch)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


Made = tuple[str, AdaptedModel, list[dict[str, Any]]]


@pytest.fixture(params=[("classification", "tiny_bert"), ("causal_lm", "tiny_llama")], ids=lambda pair: pair[0])
def made(request: pytest.FixtureRequest) -> Made:
    """A task, a model for it and texts of unequal lengths."""
    kind, folder = request.param[0], request.getfixturevalue(request.param[1])
    config = load(["model=pretrained", f"model.name='{folder}'", "rank=2", f"data.task={kind}"])
    adapted = build_model(config.model, config.adapter, family="lora_sb", task=TASKS[kind], labels=("a", "b", "c"), seed=0)
    draw = numpy_generator(0, "test")
    features = [{"input_ids": draw.integers(4, 30, n).tolist(), "target": n % 3} for n in (2, 9, 5, 3, 12, 7)]
    return kind, adapted, [{"input_ids": f["input_ids"]} for f in features] if kind == "causal_lm" else features


def test_the_size_of_a_batch_does_not_change_an_evaluation(made: Made) -> None:
    kind, adapted, features = made
    sizes = ("train.eval_batch_size=64", "train.eval_batch_size=2", "train.eval_tokens=1", "train.eval_tokens=20")
    whole, *small = (evaluate(adapted, TASKS[kind], features, train=load([size]).train) for size in sizes)
    assert all(whole == pytest.approx(other, rel=1e-5) for other in small)
    if kind == "causal_lm":
        assert whole["perplexity"] == pytest.approx(float(np.exp(whole["loss"])), rel=1e-5)


class Largest(TorchDispatchMode):
    """Notes how many values the tensors hold that come into being, largest first, each memory once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                place = tensor.untyped_storage().data_ptr()
                self.sizes[place] = max(self.sizes.get(place, 0), tensor.numel())
        return found


def test_beside_the_outputs_of_a_language_model_nothing_is_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """One cross-entropy, in pieces: no second tensor of the size of the outputs, nor of a tenth of it."""
    monkeypatch.setattr("fedsb.tasks.causal.PIECE", 4096)
    logits, batch = padded([40, 31, 40, 7], seed=1, vocabulary=1024)
    whole = LANGUAGE.record(logits, batch)
    with torch.inference_mode(), Largest() as largest:
        assert torch.equal(LANGUAGE.record(logits, batch), whole)
    largest.sizes.pop(logits.untyped_storage().data_ptr(), None)
    assert 0 < max(largest.sizes.values()) <= 4096
    assert whole[:, 0].tolist() == pytest.approx([sum(row) for row in slow_nll(logits, batch)], rel=1e-5)


def test_the_gradient_of_a_language_model_needs_no_copy_of_its_outputs() -> None:
    """The log-probabilities, their gradient and that of the outputs: forward and backward make no fourth tensor of that size."""
    logits, batch = padded([40, 31, 40, 7], seed=1, vocabulary=64)
    logits.requires_grad_()
    with Largest() as largest:
        LANGUAGE.loss(logits, batch).backward()
    largest.sizes.pop(logits.untyped_storage().data_ptr(), None)
    assert sum(size > logits.numel() / 2 for size in largest.sizes.values()) <= 3


def test_the_size_of_a_micro_batch_does_not_change_the_evidence(made: Made) -> None:
    kind, adapted, features = made
    sketch = Sketch(rank=2, oversample=2, power_iterations=0, seed=0)
    whole, small = (
        give_evidence(adapted, TASKS[kind], features, sketch=sketch, stage="range", probes=State(), micro_batch=size) for size in (64, 2)
    )
    assert squared_norm(subtract(whole, small)) < 1e-10 * squared_norm(whole)


def test_a_batch_is_read_by_the_model_that_a_path_names(tiny_bert: Path) -> None:
    config = load(["model=pretrained", f"model.name='{tiny_bert}'", "rank=2"])
    adapted = build_model(config.model, config.adapter, family="lora", task=REGRESSION, labels=(), seed=0)
    batch = {"input_ids": torch.tensor([[4, 5]]), "attention_mask": torch.ones(1, 2, dtype=torch.long), "targets": torch.zeros(1)}
    assert REGRESSION.forward(adapted.model, batch).shape == (1, 1)
    assert adapted.head == ("classifier.bias", "classifier.weight")
