"""Examples: columns, label spellings and order, pairs, numbers, and what a bad table says."""

from __future__ import annotations

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsb.core.errors import UserError
from fedsb.data import Examples, find_labels, load_corpus, read_examples
from fedsb.data.examples import natural_order


def _dataset(**columns):
    return datasets.Dataset.from_dict(columns)


def _read(cfg, **columns):
    rows = _dataset(**columns)
    return read_examples(rows, cfg, find_labels(rows, cfg))


def test_take_keeps_the_order_asked_for_in_every_column():
    examples = Examples(("a", "b", "c"), pairs=("x", "y", "z"), targets=(0, 1, 2), owners=("p", "q", "r"))
    assert examples.take([2, 0]) == Examples(("c", "a"), pairs=("z", "x"), targets=(2, 0), owners=("r", "p"))
    assert len(examples.take(())) == 0


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["b", "a", "b"], ("a", "b")),
        ([10, 9, 10], ("9", "10")),
        (["10", "9", "-1"], ("-1", "9", "10")),
        ([2.0, 1.0, 2.0], ("1", "2")),
        ([True, False, True], ("False", "True")),
    ],
)
def test_labels_found_in_the_data_are_sorted(values, names, data_config):
    rows = _dataset(text=["x"] * 3, label=values)
    labels = find_labels(rows, data_config())
    assert labels == names
    assert [labels[i] for i in read_examples(rows, data_config(), labels).targets] == [str(v).removesuffix(".0") for v in values]


@given(st.sets(st.integers()))
def test_whole_numbers_as_text_keep_their_order(numbers):
    assert natural_order(map(str, numbers)) == tuple(map(str, sorted(numbers)))


def test_given_labels_fix_the_order_and_are_compared_as_text(data_config):
    assert _read(data_config(labels=(2, 1, 0)), text=["x", "y"], label=[1, 2]).targets == (1, 0)
    assert _read(data_config(labels=("b", "a")), text=["x", "y"], label=["a", "b"]).targets == (1, 0)


def test_a_label_twice_is_refused(data_config):
    with pytest.raises(UserError, match=r"data.labels=\[1, 1\] names a label twice"):
        _read(data_config(labels=(1, "1")), text=["x"], label=[1])


def test_pairs_and_numbers_and_plain_text(data_config):
    pair = _read(data_config(text=("p", "h")), p=["a", "b"], h=["c", "d"], label=[0, 1])
    assert (pair.texts, pair.pairs) == (("a", "b"), ("c", "d"))
    assert _read(data_config(task="regression"), text=["a", "b"], label=[1, 2]).targets == (1.0, 2.0)
    assert _read(data_config(task="regression"), text=["a"], label=["1.5"]).targets == (1.5,)
    assert _read(data_config(task="causal_lm", label=None), text=["a"]).targets is None


def test_owners_are_kept_as_text(data_config):
    rows = _dataset(text=["x", "y"], label=["a", "b"], site=[3, 1])
    assert read_examples(rows, data_config(), ("a", "b"), "site").owners == ("3", "1")
    with pytest.raises(
        UserError, match=r"federation.partition.column=sites: .* no such column \(did you mean 'site'\?\); it has text, label, site"
    ):
        read_examples(rows, data_config(), ("a", "b"), "sites")


@pytest.mark.parametrize(
    ("changes", "columns", "message"),
    [
        (
            {"text": "txet"},
            {"text": ["x", "y"], "label": ["a", "b"]},
            r"data.text=txet: the training part has no such column \(did you mean 'text'\?\); it",
        ),
        ({"label": "stars"}, {"text": ["x"], "label": ["a"]}, r"data.label=stars: .*; it has text, label"),
        ({"label": None}, {"text": ["x"]}, r"data.label must be given for data.task=classification"),
        ({}, {"text": ["x", None], "label": ["a", "b"]}, r"data.text=text: row 2 of the training part is empty"),
        ({}, {"text": ["x", "y"], "label": [None, "b"]}, r"data.label=label: row 1 of the training part is empty"),
        ({}, {"text": [1, 2], "label": ["a", "b"]}, r"row 1 of the training part holds 1, which is no text"),
        ({}, {"text": ["x"], "label": [0.5]}, r"holds 0.5, no class; use data.task=regression"),
        (
            {"labels": ("a", "c")},
            {"text": ["x"], "label": ["b"]},
            r"label 'b' \(row 1 of the training part\) is not in data.labels=\[a, c\]",
        ),
        (
            {"task": "regression"},
            {"text": ["x"], "label": ["good"]},
            r"row 1 of the training part holds 'good'; data.task=regression needs finite",
        ),
        ({"task": "regression"}, {"text": ["x"], "label": [float("inf")]}, r"holds inf"),
        ({"text": ("a", "b", "c")}, {"a": ["x", "y"], "label": ["a", "b"]}, r"data.text=\[a, b, c\] names 3 columns; give one, or a pair"),
        ({}, {"text": [], "label": []}, r"the training part has no rows"),
        ({}, {"text": ["x", "y"], "label": ["a", "a"]}, r"every row of the training part has the label 'a', and one class is no class"),
        (
            {"label": "id"},
            {"text": ["x"] * 10, "id": [*range(10)]},
            r"data.label=id: no two of the 10 rows of the training part have the same label.*add data.task=regression",
        ),
        ({"labels": ("a",)}, {"text": ["x"], "label": ["a"]}, r"data.labels=\[a\]: one class is no classification; name all"),
        ({}, {"text": ["x", "y"], "label": [["a"], ["b"]]}, r"data.label=label: row 1 of the training part holds \['a'\], which is no si"),
        ({}, {"text": ["x", "y"], "label": [{"a": 1}, {"a": 2}]}, r"row 1 of the training part holds \{'a': 1\}, which is no single value"),
        ({}, {"text": ["x", "y"], "label": [b"a", b"b"]}, r"holds b'a', which is no single value"),
        ({}, {"text": ["x", "y"], "label": ["a", " "]}, r"data.label=label: row 2 of the training part is empty"),
        ({"label": "LABEL"}, {"text": ["x"], "label": ["a"]}, r"data.label=LABEL: .*did you mean 'label'"),
        ({"label": "Label "}, {"text": ["x"], "label": ["a"]}, r"data.label=Label : .*did you mean 'label'"),
    ],
)
def test_a_bad_table_is_one_line(changes, columns, message, data_config):
    with pytest.raises(UserError, match=message):
        _read(data_config(**changes), **columns)


def test_an_unlabelled_class_is_refused(data_config):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["x"], "label": [-1]}, features=features)
    with pytest.raises(UserError, match=r"row 1 of the training part has the label -1, its names are no, yes"):
        find_labels(rows, data_config())


def test_a_label_seen_only_in_the_test_part_names_the_remedy(data_config, table):
    train = table([{"text": "x", "label": "a"}, {"text": "y", "label": "b"}], "train.jsonl")
    test = table([{"text": "z", "label": "c"}], "other/test.jsonl")
    message = r"label 'c' \(row 1\) is seen only in the test part, the labels are a, b; .*data.labels=\[…\].*data.test_fraction"
    with pytest.raises(UserError, match=message):
        load_corpus(data_config(path=train, test_path=test), 0)
    assert load_corpus(data_config(path=train, test_path=test, labels=("a", "b", "c")), 0).test.targets == (2,)


def test_a_file_with_a_header_and_no_rows_is_refused(data_config, tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n")
    with pytest.raises(UserError, match="the training part has no rows"):
        load_corpus(data_config(path=str(tmp_path / "a.csv")), 0)
