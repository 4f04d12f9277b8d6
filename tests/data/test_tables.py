"""Files as people have them: only named columns count, and separators and encodings are read rightly or named."""

from __future__ import annotations

import csv
import io
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsb.core.errors import UserError
from fedsb.data import load_corpus, read_path
from fedsb.data.tables import decoded, named_columns, read_csv

GOOD = [{"text": "ein Café", "label": "a"}, {"text": "two, or\nthree", "label": "b"}, {"text": 'a "word"', "label": "a"}]
FOREIGN = [7, "7b", [1, {"a": []}], {"b": None}, "\ud83d", True, 2**80, 1e400, "x" * 5000, None]


def _values(path, cfg, owner=None):
    rows = read_path(path, cfg)
    return [{"text": text, "label": label} for text, label in zip(rows["text"], rows["label"], strict=True)]


def _written(rows, separator=",", encoding="utf-8"):
    sink = io.StringIO(newline="")
    writer = csv.DictWriter(sink, ["text", "label"], delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue().encode(encoding)


def test_the_columns_of_the_configuration_are_those_that_are_read(data_config):
    assert named_columns(data_config()) == {"text", "label"}
    assert named_columns(data_config(text=("a", "b")), "site") == {"a", "b", "label", "site"}
    assert named_columns(data_config(task="causal_lm")) == {"text"}


@given(st.lists(st.sampled_from(FOREIGN), min_size=3, max_size=3), st.booleans())
def test_no_value_of_another_column_changes_what_is_read(tmp_path_factory, data_config, foreign, whole):
    rows = [{"before": value, **row, "behind": value} for row, value in zip(GOOD, foreign, strict=True)]
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(json.dumps(rows) if whole else "\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert _values(path, data_config()) == GOOD
    assert list(read_path(path, data_config()).column_names) == ["before", "text", "label", "behind"]


def test_deep_nesting_and_long_numbers_elsewhere_are_no_traceback(data_config, tmp_path):
    (tmp_path / "long.jsonl").write_text(f'{{"id": {"9" * 6000}, "text": "x", "label": "a"}}')
    assert _values(tmp_path / "long.jsonl", data_config()) == [{"text": "x", "label": "a"}]
    (tmp_path / "deep.jsonl").write_text(f'{{"id": {"[" * 100_000}{"]" * 100_000}, "text": "x", "label": "a"}}')
    with pytest.raises(UserError, match=r"deep.jsonl cannot be read as .jsonl \(line 1: lists or objects lie too deep"):
        read_path(tmp_path / "deep.jsonl", data_config())


def test_other_columns_of_a_parquet_file_are_not_looked_at(data_config, tmp_path):
    folder = tmp_path / "label=3"  # which a reader of data sets takes for a column
    folder.mkdir()
    others = pyarrow.array([[("k", 1)], None, []], type=pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    columns = {"text": [row["text"] for row in GOOD], "label": [row["label"] for row in GOOD], "other": others}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "rows.parquet")
    assert _values(folder / "rows.parquet", data_config()) == GOOD


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("text", ["x", 7], r"data.text=text: row 2 of the training part holds 7, which is no text"),
        ("text", ["x", "a \ud83d"], r"data.text=text: row 2 of the training part holds 'a \\ud83d', with half of a character"),
        ("label", ["x", 7], r"data.label=label: row 2 of the training part holds 7, a number, and row 1 holds 'x', a text"),
        ("label", [3, True], r"data.label=label: row 2 of the training part holds True, a truth value, and row 1 holds 3, a number"),
        ("label", [[1], [2]], r"data.label=label: row 1 of the training part holds \[1\], which is no single value"),
        ("label", ["b", "\ude00"], r"data.label=label: row 2 of the training part holds '\\ude00', with half of a character"),
    ],
)
def test_a_named_column_of_several_kinds_says_where(column, values, message, data_config, table):
    rows = [{"text": "t", "label": "a", column: value} for value in values]
    with pytest.raises(UserError, match=message) as caught:
        load_corpus(data_config(path=table(rows), labels=("x", "y") if column == "text" else None), 0)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["twice.csv", "twice.jsonl", "twice.parquet"])
def test_two_columns_of_the_name_asked_for_are_a_mistake(name, data_config, tmp_path):
    path = tmp_path / name
    if name.endswith("parquet"):
        columns = [pyarrow.array(["x", "y"]), pyarrow.array(["a", "b"]), pyarrow.array(["c", "d"])]
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=["text", "label", "label"]), path)
    else:
        content = {"twice.csv": "text,label,label\nx,a,b\ny,b,a\n", "twice.jsonl": '{"text": "x", "label": "a", "label": "b"}\n'}[name]
        path.write_text(content)
    with pytest.raises(UserError, match=r"data.label=label: the training part has 2 columns of that name; rename all but one"):
        load_corpus(data_config(path=str(path)), 0)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_what_spreadsheets_write_is_read(separator, encoding, data_config, tmp_path):
    path = tmp_path / "Sheet.CSV"
    path.write_bytes(_written(GOOD, separator, encoding))
    assert _values(path, data_config()) == GOOD
    path.write_bytes(f"sep={separator}\r\n".encode() + _written(GOOD, separator))
    assert _values(path, data_config()) == GOOD


def test_an_encoding_that_is_not_certain_is_asked_for(data_config, tmp_path):
    path = tmp_path / "old.csv"
    path.write_bytes(_written(GOOD, ";", "cp1252"))
    with pytest.raises(UserError, match=r"old.csv is not UTF-8 \(line 2, byte 0xe9\); save it as UTF-8 .*data.encoding=cp1252"):
        read_path(path, data_config())
    assert _values(path, data_config(encoding="cp1252")) == GOOD
    for encoding in ("klingon", "base64"):
        with pytest.raises(UserError, match=rf"data.encoding={encoding} is no encoding"):
            read_path(path, data_config(encoding=encoding))
    path.write_bytes(_written([{"text": "x", "label": "a"}], encoding="utf-16-le"))
    with pytest.raises(UserError, match=r"holds zero bytes, as UTF-16 without its mark does; .*data.encoding=utf-16-le"):
        decoded(path)


def test_a_broken_row_is_named(data_config, tmp_path):
    for content, message in {
        "text,label\nx,a\ny,b,c\n": r"row 2 has 3 fields, the header 2",
        'text,label\nx,a\n"y,b\n': r"line 3: unexpected end of data",
    }.items():
        (tmp_path / "rows.csv").write_text(content)
        with pytest.raises(UserError, match=message):
            read_path(tmp_path / "rows.csv", data_config())
    # Empty cells behind a row are what a spreadsheet leaves.
    (tmp_path / "rows.csv").write_text("text,label\nx,a,,\n\ny,b\n")
    assert list(read_path(tmp_path / "rows.csv", data_config())["label"]) == ["a", "b"]


CELLS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=8)


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6), st.sampled_from([",", ";", "\t"]))
def test_any_text_comes_back_as_it_was_written(tmp_path_factory, data_config, rows, separator):
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    path.write_bytes(_written([{"text": text, "label": label} for text, label in rows], separator))
    table = read_csv(path, data_config(), {"text", "label"})
    assert list(zip(table["text"], table["label"], strict=True)) == rows
