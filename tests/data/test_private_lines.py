"""Under example-level privacy no line of a real node's file decides what becomes of another, whatever it holds."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from encodings.aliases import aliases
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsb.config.schema import DataConfig
from fedsb.core.errors import UserError
from fedsb.data import load_site
from fedsb.data.private_rows import count_rows, read_private_rows
from fedsb.tasks.task import IGNORED
from tests.data.own_rows import (
    CELLS,
    EXAMPLES,
    GOOD,
    JSON,
    LABELS,
    LINES,
    Configure,
    csv_lines,
    features,
    json_lines,
    only_its_own,
    written,
)


@EXAMPLES
@given(place=st.integers(0, 6), line=LINES | JSON.map(json.dumps) | st.fixed_dictionaries({"text": CELLS, "label": CELLS}).map(json.dumps))
def test_a_line_of_json_flipped_to_anything_moves_no_other(place: int, line: str, configured: Configure, tmp_path: Path) -> None:
    only_its_own(configured(), tmp_path / "a.jsonl", json_lines(), place, line)


@EXAMPLES
@given(
    place=st.integers(0, 6),
    line=LINES | st.text(alphabet='",;a \r') | st.lists(st.text(), max_size=4).map(lambda row: '"' + '","'.join(row)),
)
def test_a_line_of_csv_flipped_to_anything_moves_no_other(place: int, line: str, configured: Configure, tmp_path: Path) -> None:
    line = line.replace("\n", " ")
    only_its_own(configured(), tmp_path / "a.csv", csv_lines(), place, line, ("text,label",))


@pytest.mark.parametrize("open_quote", ['"great,film', '"great', 'film,"'])
def test_a_quote_that_a_line_of_csv_does_not_close_takes_no_other_line_with_it(
    open_quote: str, configured: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not where a later line has a quote before a separator either, which would close it."""
    lines = [*csv_lines()[:4], 'a screen of 15",film', *csv_lines()[4:]]
    only_its_own(configured(), tmp_path / "a.csv", lines, 1, open_quote, ("text,label",))
    assert "the lines of 1 rows end inside of quotes (2)" in caplog.text


@pytest.mark.parametrize("line", ['{"text": ' + "[" * 100_000, '{"text": "\\ud800", "label": "film"}', '{"text": "x", "label": 1e999}', ""])
def test_lines_that_parsers_break_at_move_no_other(line: str, configured: Configure, tmp_path: Path) -> None:
    only_its_own(configured(), tmp_path / "a.jsonl", json_lines(), 3, line)


def test_bytes_that_are_no_text_move_no_other(configured: Configure, tmp_path: Path) -> None:
    before = features(configured(), written(tmp_path / "a.csv", ["text,label", *csv_lines()]))
    (tmp_path / "a.csv").write_bytes((tmp_path / "a.csv").read_bytes().replace(b"a new actor 2", b"\xff\xfe\xc3"))
    after = features(configured(), tmp_path / "a.csv")
    assert [row for i, row in enumerate(after) if i != 2] == [row for i, row in enumerate(before) if i != 2]


COUNTING = ("lost 5 kilos", "lost 5% of it", "two\nlines", "+AAo-", "\\u000a", '\x1b$B"\x0e~{', "\x15\x25\x85")


def counted(cfg: DataConfig, path: Path) -> int | str:
    try:
        return count_rows(cfg, path)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_nothing_that_a_server_names_counts_what_stands_in_a_row(kind: str, configured: Configure, tmp_path: Path) -> None:
    """In one encoding ``%`` ends a line, in another ``\\n`` does. A line of a .csv is a row, so that its texts hold none."""
    cfg = configured().data
    encodings = sorted({*aliases.values(), "utf-8", "unicode_escape", "raw_unicode_escape"})
    named = {name: replace(cfg, encoding=name) for name in encodings} | {
        text: replace(cfg, text=text, label=None, task="causal_lm") for text in ("text,more;label", "text;more")
    }
    found: dict[str, list[int | str]] = {name: [] for name in named}
    for secret in COUNTING:
        path = tmp_path / f"a.{kind}"
        if kind == "jsonl":
            written(path, [*json_lines(), json.dumps({"text": secret, "label": "film"}, ensure_ascii=False)])
        else:
            with path.open("w", encoding="utf-8", newline="") as file:
                rows = [("text", "more;label", "label"), *GOOD, (secret.replace("\n", " "), "", "film")]
                csv.writer(file, lineterminator="\n").writerows(rows)
        for name, own in named.items():
            found[name].append(counted(own, path))
    assert {len(set(counts)) for counts in found.values()} == {1}
    refused = {name for name, counts in found.items() if counts[0] != 8}
    assert {"cp037", "utf_16_le"} <= refused
    assert not refused & ({"cp1252", "utf_8", "latin_1", "shift_jis"} | (named.keys() - set(encodings)))


@EXAMPLES
@given(place=st.integers(0, 6), value=st.none() | st.floats() | st.sampled_from([-100.0, 1e300]))
def test_a_number_flipped_to_anything_moves_no_other(place: int, value: float | None, configured: Configure, tmp_path: Path) -> None:
    config = configured("data.task=regression", "data.labels=null")
    tables = [[0.5 * i for i in range(7)] for _ in range(2)]
    tables[1][place] = value  # type: ignore[call-overload]
    found = []
    for numbers in tables:
        pyarrow.parquet.write_table(pyarrow.table({"text": [text for text, _ in GOOD], "label": numbers}), tmp_path / "a.parquet")
        found.append(features(config, tmp_path / "a.parquet"))
    assert [row for i, row in enumerate(found[0]) if i != place] == [row for i, row in enumerate(found[1]) if i != place]
    usable = value is not None and abs(value) <= 3.4e38
    assert math.isnan(found[1][place]["target"]) != usable


def test_what_can_be_used_is_read_as_it_is_without_privacy(configured: Configure, tmp_path: Path) -> None:
    cfg = configured().data
    texts, labels = (list(column) for column in zip(*GOOD, strict=True))
    texts[1] = "one line\r in quotes; and ünïcode \u2028"
    rows = list(zip(texts, labels, strict=True))
    with (tmp_path / "a.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=";").writerows([("label", "text"), *((label, text) for text, label in rows)])
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t, "label": y, "more": [1]}) + "\n" for t, y in rows))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": labels}), tmp_path / "a.parquet")
    classes = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(LABELS))})
    datasets.Dataset.from_dict({"text": texts, "label": labels}, features=classes).save_to_disk(tmp_path / "saved")
    for name in ("a.csv", "a.jsonl", "a.parquet", "saved"):
        found = read_private_rows(cfg, tmp_path / name, LABELS, no_target=IGNORED)
        assert found.examples == load_site(cfg, tmp_path / name, LABELS)
        assert not found.unusable
        assert count_rows(cfg, tmp_path / name) == 7


def test_what_no_row_decides_is_refused(configured: Configure, tmp_path: Path) -> None:
    cfg = configured().data
    cases = {
        "a.json": ("[]", "a.json cannot be read under privacy.unit=example; give one of .csv, .jsonl, .*write a row a line"),
        "b.csv": ("txt,label\nx,film\n", r"^data.text=text: the client's own data has no such column \(did you mean 'txt'\?\)"),
        "c.csv": ("text,label,label\nx,film,film\n", "^data.label=label: the client's own data has 2 columns of that name"),
        "d.csv": ("text,label\n", "has no rows"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=message):
            read_private_rows(cfg, tmp_path / name, LABELS, no_target=IGNORED)
