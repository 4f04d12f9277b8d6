"""A head that a checkpoint brings is for the labels at hand, row by row, or drawn anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor

from fedsb.config.compose import load
from fedsb.models.heads import remarks_on
from fedsb.models.loading import load_network
from fedsb.tasks.task import TASKS
from tests.architectures import BERT, LLAMA
from tests.conftest import encoder_tokenizer, save

DATA = ("film", "sport", "trade")
KINDS = {
    "bert": (hf.BertForSequenceClassification, hf.BertConfig, BERT, "classifier.weight"),
    "roberta": (hf.RobertaForSequenceClassification, hf.RobertaConfig, BERT, "classifier.out_proj.weight"),
    "llama": (hf.LlamaForSequenceClassification, hf.LlamaConfig, LLAMA, "score.weight"),
}


def loaded(kind: str, names: tuple[str, ...], labels: tuple[str, ...], folder: Path) -> tuple[Tensor, Tensor, str]:
    """Return the head's last weight in the checkpoint and as it is loaded, and what is said."""
    model, config, sizes, weight = KINDS[kind]
    made = model(config(**sizes, num_labels=len(names), id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}))
    settings = load(["model=pretrained", f"model.name='{save(made, encoder_tokenizer(), folder)}'"]).model
    network = load_network(settings, TASKS["classification"], labels, 0, "cpu")
    return made.get_parameter(weight).detach(), network.get_parameter(weight).detach(), " ".join(remarks_on(network))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_go_by_name(kind: str, tmp_path: Path) -> None:
    before, after, said = loaded(kind, ("Trade", "film", "SPORT"), DATA, tmp_path)
    assert torch.equal(after, before[[1, 2, 0]])
    assert "brought into the order of the data's (film, sport, trade)" in said


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_for_other_labels_is_drawn_anew(kind: str, tmp_path: Path) -> None:
    before, after, said = loaded(kind, ("good", "bad", "ugly"), DATA, tmp_path)
    assert not torch.isclose(after, before).any(1).all()
    assert 0.01 < float(after.std()) < 0.04
    assert "(good, bad, ugly), and the data's are others" in said


def test_a_head_drawn_anew_is_the_seeds_whatever_the_process_has_drawn(tmp_path: Path) -> None:
    drawn = []
    for before in (1, 2):
        torch.manual_seed(before)
        drawn.append(loaded("roberta", ("good", "bad", "ugly"), DATA, tmp_path / str(before))[1])
    assert torch.equal(*drawn)


def test_the_same_order_is_kept_without_a_word(tmp_path: Path) -> None:
    before, after, said = loaded("bert", DATA, DATA, tmp_path)
    assert torch.equal(after, before)
    assert not said


def test_rows_without_names_are_kept_and_said(tmp_path: Path) -> None:
    before, after, said = loaded("bert", ("LABEL_0", "LABEL_1", "LABEL_2"), DATA, tmp_path)
    assert torch.equal(after, before)
    assert "names no classes" in said


def test_another_number_of_classes_is_said(tmp_path: Path) -> None:
    _, after, said = loaded("bert", DATA, DATA[:2], tmp_path)
    assert after.shape[0] == 2
    assert "for 3 classes (film, sport, trade), and the data have 2: it is drawn anew" in said
