"""The split script: what it writes reads back as the simulated clients' own examples."""

from __future__ import annotations

import json
import resource
import runpy
from pathlib import Path

import pytest

from fedsb.app.assembly import corpus_of
from fedsb.app.client_data import client_examples
from fedsb.config.compose import load
from fedsb.config.derived import client_names
from fedsb.data import load_corpus, load_site, load_test, partition

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "split_data.py"
ROWS = [{"review": f"t{i} \u2028 \u20ac\r\n", "note": f"n{i}", "stars": i % 11, "score": i / 7, "shop": f"s{i % 3}"} for i in range(60)]
COMMON = ["data=files", "data.text=review", "data.label=stars", "federation.num_clients=3", "seed=5"]


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(SCRIPT))["main"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["federation.partition.kind=iid"],
        ["federation.partition.kind=dirichlet", "federation.partition.alpha=5", "data.text=[review,note]"],
        ["federation.partition.kind=natural", "federation.partition.column=shop", "federation.names=[x,y,z]"],
        ["federation.partition.kind=iid", "data.task=regression", "data.label=score"],
        ["federation.partition.kind=iid", "data.task=causal_lm", "data.label=null"],
    ],
)
def test_a_node_reads_exactly_the_simulated_clients_examples(overrides, main, table, tmp_path):
    out, arguments = tmp_path / "out", [*COMMON, f"data.path={table(ROWS)}", *overrides]
    assert main([str(out), *arguments]) == 0
    config = load(arguments)
    dealing = config.federation.partition
    corpus = load_corpus(config.data, config.seed, dealing.column)
    simulated = partition(corpus.train, dealing, client_names(config), config.seed)
    for name, indices in simulated.items():
        site, own = load_site(config.data, out / name, corpus.labels), corpus.train.take(indices)
        assert (site.texts, site.pairs, site.targets) == (own.texts, own.pairs, own.targets)
    server = load_test(load([*arguments, "data.path=null", f"data.test_path={out / 'server' / 'test.jsonl'}"]).data)
    assert server.test.texts == corpus.test.texts
    assert tuple((out / "labels.txt").read_text().splitlines()) == corpus.labels == server.labels


LONG = [{"review": "goal " * (1 + i % 40), "note": f"team {i}", "stars": i % 3} for i in range(60)]
TOLD = ["data.prompt=review", "data.response=note", "data.label=null", "data.text=null", "data.task=causal_lm", "train.max_length=24"]


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        ("tiny_bert", ["federation.partition.kind=length", "federation.partition.alpha=5"]),
        ("tiny_bert", ["federation.partition.kind=cluster", "federation.partition.alpha=5", "federation.partition.groups=3"]),
        ("tiny_bert", ["federation.partition.kind=quantity", "eval.select=loss", "data.validation_fraction=0.2"]),
        ("tiny_gpt2", ["federation.partition.kind=iid", *TOLD]),  # of some rows nothing is left to learn
    ],
)
def test_what_a_simulation_deals_by_more_than_labels_is_what_is_written(model, overrides, main, table, tmp_path, request, monkeypatch):
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    named = ["model=pretrained", f"model.name='{request.getfixturevalue(model)}'", "device=cpu"]
    out, arguments = tmp_path / "out", [*COMMON, f"data.path={table(LONG)}", *named, *overrides]
    assert main([str(out), *arguments]) == 0
    config = load(arguments)
    corpus, rows = corpus_of(config), 0
    for name in client_names(config):
        site = load_site(config.data, out / name, corpus.labels)
        own, held_out = client_examples(config, name, None, corpus.labels)
        assert not len(held_out)
        assert (site.texts, site.targets) == (own.texts, own.targets)
        rows += len(site)
    assert rows == len(corpus.train)
    assert (out / "server" / "validation.jsonl").exists() == (corpus.validation is not None)


def test_rows_carry_label_names(main, table, tmp_path):
    rows = [{"review": f"t{i}", "stars": "no" if i % 2 else "yes"} for i in range(40)]
    assert main([str(tmp_path / "out"), *COMMON, f"data.path={table(rows)}"]) == 0
    written = [json.loads(line) for line in (tmp_path / "out" / "client-0" / "train.jsonl").read_text().splitlines()]
    assert all(set(row) == {"review", "stars"} and row["stars"] in ("no", "yes") for row in written)


def test_what_a_disk_refuses_leaves_the_parts_that_were_there(main, table, tmp_path, capsys):
    out, arguments = tmp_path / "out", [*COMMON, f"data.path={table(ROWS)}", "federation.partition.kind=iid"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for found in ({}, None):
        if found is None:
            assert main([str(out), *arguments, "seed=6"]) == 0
            found = {path: path.read_bytes() for path in out.rglob("*.*")}
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
        try:
            assert main([str(out), *arguments]) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert capsys.readouterr().err == "split_data.py: file too large\n"
        assert {path: path.read_bytes() for path in out.rglob("*.*")} == found


def test_a_mistake_is_one_line_and_status_2(main, tmp_path, capsys):
    assert main([str(tmp_path / "out"), *COMMON]) == 2
    assert capsys.readouterr().err == "split_data.py: data.path must be given for data=files: add data.path=…\n"
    assert main(["data=files"]) == 2
    assert "usage" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
