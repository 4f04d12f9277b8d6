"""What is said of the data before a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsb.app.assembly import features_of
from fedsb.app.assembly import measured_features as features_of_test
from fedsb.app.opening import cut_texts
from fedsb.config.compose import load
from fedsb.config.schema import Config
from fedsb.data import Examples


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A table of 1, 2, 3 … 10 words a text."""
    path = tmp_path / "texts.csv"
    path.write_text("text,label\n" + "".join(f"{' '.join(['goal'] * words)},{'xy'[words % 2]}\n" for words in range(1, 11)))
    return path


def configured(texts: Path, model: Path, *more: str) -> Config:
    files = ["data=files", f"data.path={texts}", f"data.test_path={texts}", "data.label=label"]
    return load(["model=pretrained", f"model.name='{model}'", *files, *more])


@pytest.mark.parametrize(("limit", "share"), [(12, ""), (11, "10%"), (7, "50%")])
def test_a_text_that_just_fits_is_not_cut(texts: Path, tiny_bert: Path, limit: int, share: str) -> None:
    """With [CLS] and [SEP] the ten texts have 3 to 12 tokens."""
    said = cut_texts(configured(texts, tiny_bert, f"train.max_length={limit}"))
    assert said == (
        f"{share} of the training texts are longer than train.max_length={limit} tokens: their ends are cut off" if share else ""
    )


@pytest.mark.parametrize(("limit", "share"), [(11, ""), (10, "10%"), (6, "50%")])
def test_a_language_model_loses_the_end_of_a_text_that_fills_it(texts: Path, tiny_llama: Path, limit: int, share: str) -> None:
    """With the end-of-text token the ten texts have 2 to 11 tokens."""
    config = configured(texts, tiny_llama, "data.task=causal_lm", f"train.max_length={limit}")
    assert cut_texts(config).partition(" ")[0] == share
    ends = [f["input_ids"][-1] == 2 for f in features_of(config, Examples(tuple(" ".join(["goal"] * n) for n in range(1, 11))))]
    assert ends == [n + 1 <= limit for n in range(1, 11)]


def test_a_server_without_training_data_speaks_of_the_test_texts(texts: Path, tiny_bert: Path) -> None:
    config = configured(texts, tiny_bert, "data.path=null", "data.labels=[x,y]", "train.max_length=7")
    assert cut_texts(config) == "50% of the test texts are longer than train.max_length=7 tokens: their ends are cut off"


def test_a_part_of_the_test_part_is_drawn_once_and_by_class(tiny_csv: Path, tiny_bert: Path) -> None:
    files = ["data=files", f"data.path='{tiny_csv}'", "model=pretrained", f"model.name='{tiny_bert}'"]
    whole = features_of_test(load(files))
    some, again, other = (features_of_test(load([*files, "eval.max_examples=12", *more])) for more in ([], [], ["seed=1"]))
    assert some == again != other
    assert len(whole) > len(some) == 12
    assert all(feature in whole for feature in some)
    assert [sum(feature["target"] == label for feature in some) for label in range(3)] == [4, 4, 4]
    assert features_of_test(load([*files, "eval.max_examples=100"])) == whole


def test_the_models_own_limit_is_named(tmp_path: Path, tiny_bert: Path) -> None:
    path = tmp_path / "long.csv"
    path.write_text("text,label\n" + f"{'goal ' * 60},x\n" + "goal,y\n" * 3)
    said = cut_texts(configured(path, tiny_bert, "train.max_length=64"))
    assert said == "25% of the training texts are longer than the model's limit=48 tokens: their ends are cut off"
