"""Clusters of texts are those of k-means on the untouched model's mean states, made once for all processes of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from shlex import join

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from transformers import AutoConfig, AutoModel, AutoTokenizer

from fedsb import client_app
from fedsb.app.assembly import corpus_of, features_of, forget_data, parts_of, skew_in, task_of
from fedsb.app.clusters import clusters
from fedsb.config.compose import load
from fedsb.config.schema import Config
from fedsb.core.errors import UserError
from fedsb.core.rng import stream_seed
from fedsb.runtime.local import LocalGrid
from fedsb.server_app import serve


@pytest.fixture
def given(tiny_bert: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    forget_data()
    return [
        "model=pretrained", f"model.name='{tiny_bert}'", "data=files", f"data.path='{tiny_csv}'", "device=cpu", "rank=2", "plots=false",
        "federation.num_clients=3", "federation.num_rounds=1", "train.local_steps=1", "train.max_length=16",
        "federation.partition.kind=cluster", "federation.partition.groups=3", "federation.partition.alpha=0.2",
    ]  # fmt: skip


def made(config: Config) -> tuple[int, ...]:
    train = corpus_of(config).train
    return clusters(config, task_of(config), train, features_of(config, train), corpus_of(config).labels).of


def test_clusters_are_those_of_the_mean_states_text_by_text(given: list[str], tiny_bert: Path) -> None:
    config = load(given)
    texts = corpus_of(config).train.texts
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_bert), AutoModel.from_pretrained(tiny_bert).eval()
    states = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**tokenizer(text, truncation=True, max_length=16, return_tensors="pt")).last_hidden_state
        states.append(hidden[0].mean(0).double().numpy())
    wanted = KMeans(3, n_init=4, random_state=stream_seed(0, "partition.cluster") % 2**32).fit_predict(np.array(states))
    found = made(config)
    assert len(set(zip(found, wanted.tolist(), strict=True))) == 3  # the same groups, by other names
    assert np.bincount(found).tolist() == sorted(np.bincount(found), reverse=True)


@pytest.mark.parametrize("columns", [("data.text=text",), ("data.prompt=text", "data.response=label")])
def test_texts_of_a_language_model_have_clusters_too(given: list[str], tiny_gpt2: Path, columns: tuple[str, ...]) -> None:
    language = [f"model.name='{tiny_gpt2}'", "data.task=causal_lm", "data.label=null", *columns]
    config = load([*given, *language])
    of = made(config)
    assert set(of) == {0, 1, 2}
    assert sorted(i for rows in parts_of(config).values() for i in rows) == list(range(len(of)))


def test_they_are_kept_and_what_is_kept_counts(given: list[str], tmp_path: Path) -> None:
    config = load(given)
    first = made(config)
    [path] = (tmp_path / "home" / "partitions").glob("*.json")
    assert tuple(json.loads(path.read_text())) == first
    turned = [2 - group for group in first]
    path.write_text(json.dumps(turned))
    assert made(config) == tuple(turned)
    made(load([*given, "seed=1"]))
    assert len(list((tmp_path / "home" / "partitions").glob("*.json"))) == 2


def test_they_are_those_of_another_model_in_the_same_place_once_it_is_another(given: list[str], tiny_bert: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    shutil.copytree(tiny_bert, place)
    config = load([*given, f"model.name='{place}'"])
    first = made(config)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        AutoModel.from_config(AutoConfig.from_pretrained(place)).save_pretrained(place)
    second = made(config)
    shutil.rmtree(tmp_path / "home" / "partitions")
    assert made(config) == second != first


def test_what_is_kept_and_damaged_is_made_again(given: list[str], tmp_path: Path) -> None:
    config = load(given)
    first = made(config)
    [path] = (tmp_path / "home" / "partitions").glob("*.json")
    for torn in (path.read_text()[:20], "[0, 1]", '"no list"', json.dumps([-1] * len(first))):
        path.write_text(torn)
        assert made(config) == first
        assert tuple(json.loads(path.read_text())) == first


def test_a_run_is_dealt_by_them_and_says_how_unlike_its_clients_are(given: list[str], tmp_path: Path) -> None:
    config = load(given)
    summary = serve(config, LocalGrid.simulation(client_app.app, {"overrides": join(given)}), tmp_path / "run")
    found, of = summary["partition"], np.array(made(config))
    parts = parts_of(config)
    whole = np.bincount(of, minlength=3) / len(of)
    apart = [
        len(rows) / len(of) * np.abs(np.bincount(of[list(rows)], minlength=3) / len(rows) - whole).sum() / 2 for rows in parts.values()
    ]
    assert found["dealt_by"] == "cluster"
    assert found["group_skew"] == pytest.approx(sum(apart))
    skew = skew_in(config)
    assert skew is not None
    assert f"cluster skew {sum(apart):.2f} over 3 groups" in skew.line()
    assert skew.line() in (tmp_path / "run" / "run.log").read_text()


def test_more_groups_than_examples_are_one_line(given: list[str]) -> None:
    with pytest.raises(UserError, match=r"^federation.partition.groups=500: there are 86 training examples; lower it$"):
        made(load([*given, "federation.partition.groups=500"]))
