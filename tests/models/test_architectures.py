"""Laws that hold whatever the architecture: one model in a run, as an adapter and merged; and no example that knows who lies beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from fedsb.adapters import layers
from fedsb.adapters.merging import merged_copy
from fedsb.app.exports.at_end import export_run
from fedsb.config.compose import load
from fedsb.config.schema import Config
from fedsb.data import tokenise
from fedsb.data.examples import Examples
from fedsb.models.adapted import AdaptedModel
from fedsb.models.build import build_model
from fedsb.models.collating import collate
from fedsb.run.folder import RunFolder
from fedsb.tasks.task import TASKS, Task
from tests.architectures import DECODERS, ENCODERS, LANGUAGE_MODELS, checkpoint

# peft 0.21 on transformers 5 still reads the attribute's old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
LABELS = ("film", "sport", "trade")
TEXTS = ("goal", "the old bank said a new price of the market", "a film", "a scene of the director was new last year")
HEAD, WORDS = TASKS["classification"], TASKS["causal_lm"]
CASES = [*((name, HEAD) for name in (*ENCODERS, *DECODERS)), *((name, WORDS) for name in LANGUAGE_MODELS)]


class Built:
    """A model of an architecture, whose adapters and head do something."""

    def __init__(self, name: str, task: Task, folder: Path, *overrides: str, **edits: Any) -> None:
        self.task, self.base = task, checkpoint(name, folder / "base", **edits)
        self.config: Config = load(["model=pretrained", f"model.name='{self.base}'", "rank=3", f"data.task={task.name}", *overrides])
        model, adapter = self.config.model, self.config.adapter
        self.adapted: AdaptedModel = build_model(model, adapter, family="lora_sb", task=task, labels=LABELS, seed=0)
        stream = torch.Generator().manual_seed(5)
        for layer in layers(self.adapted.model).values():
            for role in layer.spec.in_log:
                layer.hold(role, 0.3 * torch.randn(layer.weight_of(role).shape, generator=stream))
        with torch.no_grad():
            for p in self.adapted.trainable().values():
                p.copy_(0.3 * torch.randn(p.shape, generator=stream))

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """Yield the texts in padded batches."""
        assert self.adapted.tokenizer is not None
        features = [dict(f) for f in tokenise(Examples(TEXTS), self.adapted.tokenizer, 32)]
        for start in range(0, len(features), size):
            yield collate(features[start : start + size], self.adapted, self.task)

    def logits(self, model: nn.Module, size: int) -> list[Tensor]:
        """Return what the model says of each text, at its real tokens where it says something of each token."""
        found: list[Tensor] = []
        with torch.no_grad():
            for batch in self.batches(size):
                outputs = self.task.forward(model, batch)
                lengths = batch["attention_mask"].sum(1).tolist()
                found += [row if self.task.has_head else row[:length] for row, length in zip(outputs, lengths, strict=True)]
        return found


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}, {case[1].name}")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(*request.param, tmp_path_factory.mktemp("architecture"))


def apart(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest value."""
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(one, other, strict=True))


def test_the_run_its_adapter_and_its_merged_model_are_one_model(built: Built, tmp_path: Path) -> None:
    agree(built, tmp_path)


def agree(built: Built, tmp_path: Path) -> None:
    """Hold that what others load computes what the run does."""
    kind: Any = built.task.auto_class
    ours = built.logits(built.adapted.model, 2)
    merged_copy(built.adapted.model).save_pretrained(tmp_path / "merged")  # type: ignore[operator]
    assert apart(ours, built.logits(kind.from_pretrained(tmp_path / "merged").eval(), 2)) < 1e-4
    export_run(built.config, built.adapted, RunFolder(tmp_path / "run"))
    torch.manual_seed(99)  # what the base lacks is drawn otherwise here
    base = kind.from_pretrained(built.base, **built.task.model_options(LABELS))
    base.config.pad_token_id = built.adapted.model.config.pad_token_id  # type: ignore[union-attr]
    before = built.logits(base.eval(), 2)
    theirs = built.logits(PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).eval(), 2)
    assert apart(ours, theirs) < 1e-4
    assert apart(ours, before) > 1e-2


def test_an_example_is_the_same_alone_and_in_company(built: Built) -> None:
    assert apart(built.logits(built.adapted.model, 1), built.logits(built.adapted.model, len(TEXTS))) < 1e-4


def test_every_trained_tensor_is_moved(built: Built) -> None:
    trained = built.adapted.trainable()
    for batch in built.batches(len(TEXTS)):
        if built.task.has_head:
            batch["targets"] = torch.tensor([0, 1, 2, 0])
        built.task.loss(built.task.forward(built.adapted.model, batch), batch).backward()
    assert not [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    for p in trained.values():
        p.grad = None


def test_shapes_alone_tell_what_is_trained(built: Built) -> None:
    """What a run costs is foretold on the meta device, where no layer computes anything."""
    model, adapter = built.config.model, built.config.adapter
    shapes = build_model(model, adapter, family="lora_sb", task=built.task, labels=LABELS, seed=0, device="meta")
    assert shapes.layouts == built.adapted.layouts


TIED = {
    "llama": ("llama", WORDS, "model.embed_tokens.weight", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", WORDS, "transformer.wte.weight", {}),
    "t5": ("t5", HEAD, "transformer.shared.weight", {}),
    "bart": ("bart", HEAD, "model.shared.weight", {}),
}


@pytest.mark.parametrize("case", TIED)
def test_tied_embeddings_that_are_trained_stay_one(case: str, tmp_path: Path) -> None:
    name, task, head, edits = TIED[case]
    patterns = [head, "classification_head*"] if task is HEAD else [head]
    agree(Built(name, task, tmp_path, f"model.head={patterns}", **edits), tmp_path)
