"""Under example-level privacy no row of a real node's file decides what becomes of another, whatever it holds."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from encodings.aliases import aliases
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForSequenceClassification,
)

from fedsb.app.assembly import _MEMO, client_features, num_examples
from fedsb.config.compose import load
from fedsb.config.schema import Config, DataConfig
from fedsb.core.errors import UserError
from fedsb.data import Examples, PrivateRows, load_site
from fedsb.data.private_rows import count_rows, read_private_rows
from fedsb.models.build import build_model
from fedsb.models.collating import collate
from fedsb.node.own_data import private_features
from fedsb.tasks.task import IGNORED, TASKS
from tests.architectures import BART, T5
from tests.conftest import encoder_tokenizer, save

LABELS = ("film", "sport", "trade")
GOOD = [(f'the "goal", said number {i}' if i % 2 else f"a new actor {i}", LABELS[i % 3]) for i in range(7)]
Configure = Callable[..., Config]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)
CELLS = st.one_of(JSON, st.sampled_from([10**400, "9" * 5000, "\ud800", "x" * 200_000, "", " ", math.nan, *LABELS]))
LINES = st.text().map(lambda text: text.replace("\n", " "))
EXAMPLES = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def configured(tiny_bert: Path) -> Configure:
    base = [
        "model=pretrained",
        f"model.name='{tiny_bert}'",
        "data=files",
        "train.max_length=12",
        "device=cpu",
        "data.labels=[film,sport,trade]",
    ]
    return cache(lambda *more: load([*base, "privacy=example", "privacy.noise_multiplier=2", *more]))


def features(config: Config, path: Path) -> list[dict[str, Any]]:
    """Return a client's features as a process reads them that has read nothing yet."""
    for kind in ("features", "private site"):
        _MEMO.pop(kind, None)
    train, held_out = client_features(config, "a", str(path), LABELS)
    assert not held_out
    assert num_examples(config, "a", str(path), LABELS) == len(train)
    return train


def json_lines() -> list[str]:
    return [json.dumps({"text": text, "label": label}) for text, label in GOOD]


def csv_lines() -> list[str]:
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows(GOOD)
    return out.getvalue().splitlines()


def written(path: Path, lines: list[str]) -> Path:
    path.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass"))
    return path


def only_its_own(config: Config, path: Path, whole: list[str], place: int, line: str, head: tuple[str, ...] = ()) -> None:
    """Hold that a line in place of another moves nothing but itself."""
    before = features(config, written(path, [*head, *whole]))
    after = features(config, written(path, [*head, *whole[:place], line, *whole[place + 1 :]]))
    assert len(after) == len(before)
    assert [row for i, row in enumerate(after) if i != place] == [row for i, row in enumerate(before) if i != place]


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


CHATS = ("data.task=causal_lm", "data.messages=chat", "data.label=null", "data.labels=null")
TURNS = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "bot"]), "content": CELLS}), max_size=4)


@EXAMPLES
@given(place=st.integers(0, 6), chat=JSON | TURNS | TURNS.map(json.dumps))
def test_a_chat_flipped_to_anything_moves_no_other(place: int, chat: Any, configured: Configure, tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": label}] for text, label in GOOD]
    lines = [json.dumps({"chat": each}) for each in turns]
    only_its_own(configured(*CHATS), tmp_path / "a.jsonl", lines, place, json.dumps({"chat": chat}))


CHATLESS: dict[str, tuple[Any, str]] = {
    "no list": (7, "no list of messages"),
    "an unknown role": ([{"role": "bot", "content": "a"}], "an unknown role"),
    "no answer": ([{"role": "user", "content": "a"}], "an empty response"),
    "no messages": (None, "no list of messages"),
    "half of a character": ([{"role": "assistant", "content": "\ud800"}], "half of a character"),
}


@pytest.mark.parametrize("case", CHATLESS)
def test_a_chat_that_cannot_be_used_is_one_token_without_a_loss(
    case: str, configured: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chat, why = CHATLESS[case]
    answered = [{"role": "user", "content": "new goal"}, {"role": "assistant", "content": "actor"}]
    long = [{"role": "user", "content": "goal " * 60}, {"role": "assistant", "content": "actor"}]
    lines = [json.dumps({"chat": each}) for each in (answered, chat, answered, long)]
    found = features(configured(*CHATS), written(tmp_path / "a.jsonl", lines))
    assert [any(row["learnt"]) for row in found] == [True, False, True, False]
    assert (len(found[1]["input_ids"]), len(found[3]["input_ids"])) == (1, 12)
    assert f"1 of 4 rows cannot be used and take part without a loss (row 2: {why})" in caplog.text
    assert "train.max_length leaves nothing of 1 responses; these rows take part without a loss: 4" in caplog.text


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


ODD = {
    "a label outside the list": {"text": "a goal", "label": "hiv"},
    "no label": {"text": "a goal"},
    "a list for a label": {"text": "a goal", "label": ["film"]},
    "an empty text": {"text": " ", "label": "film"},
    "no text": {"label": "film"},
    "a number for a text": {"text": 7, "label": "film"},
    "another kind of row": [1, 2],
}


@pytest.mark.parametrize("case", ODD)
def test_a_row_that_cannot_be_used_keeps_its_place_and_is_named_in_the_nodes_own_log(
    case: str, configured: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = json_lines()
    lines[4] = json.dumps(ODD[case])
    found = features(configured(), written(tmp_path / "a.jsonl", lines))
    assert found[4]["target"] == IGNORED
    assert [len(ids) for ids in (found[4]["input_ids"], found[4]["token_type_ids"])] == [2, 2]  # the frame of a text
    assert "1 of 7 rows cannot be used and take part without a loss (row 5: " in caplog.text
    assert "hiv" not in caplog.text


@pytest.mark.parametrize("columns", ["text", "[text,more]"])
@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_a_row_that_cannot_be_used_does_not_stop_a_model_that_looks_for_the_end_of_a_text(
    kind: str, columns: str, configured: Configure, tmp_path: Path
) -> None:
    model = {
        "bart": lambda: BartForSequenceClassification(BartConfig(**BART, decoder_start_token_id=3, num_labels=3)),
        "t5": lambda: T5ForSequenceClassification(T5Config(**T5, pad_token_id=0, decoder_start_token_id=0, num_labels=3)),
    }[kind]()
    folder = save(model, encoder_tokenizer(), tmp_path / kind)
    config = configured(f"model.name='{folder}'", f"data.text={columns}")
    lines = [json.dumps({"text": text, "more": "a goal", "label": label}) for text, label in GOOD]
    lines[4] = json.dumps({"text": "a goal", "more": "a goal", "label": "hiv"})
    found, task = features(config, written(tmp_path / "a.jsonl", lines)), TASKS["classification"]
    adapted = build_model(config.model, config.adapter, family="lora", task=task, labels=LABELS, seed=0)
    batch = collate(found, adapted, task, 12)
    losses = task.losses(task.forward(adapted.model, batch), batch)
    assert [place for place, loss in enumerate(losses.tolist()) if loss == 0] == [4]


@pytest.mark.parametrize("text", ["a goal", "zebra"])
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_a_row_that_the_tokenizer_does_not_take_moves_no_other(
    task: str, text: str, configured: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without an unknown token a word that it does not know makes it raise, for all texts that it is given."""
    known = Tokenizer(WordLevel({word: i for i, word in enumerate(["</s>", *(f"w{i}" for i in range(30)), "a", "goal"])}))
    known.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=known, eos_token="</s>", pad_token="</s>", unk_token=None).save_pretrained(tmp_path / "own")
    lines = [json.dumps({"text": f"w{i} w{i + 1}", "label": LABELS[i % 3]}) for i in range(7)]
    line = json.dumps({"text": text, "label": "film"})
    more = ("data.label=null", "data.labels=null") if task == "causal_lm" else ()
    config = configured(f"model.tokenizer='{tmp_path / 'own'}'", f"data.task={task}", *more)
    only_its_own(config, tmp_path / "a.jsonl", lines, 3, line)
    row = features(config, tmp_path / "a.jsonl")[3]
    assert (text == "zebra") == (len(row["input_ids"]) == 1) == ("row 4: the tokenizer does not take it" in caplog.text)
    assert row.get("target", IGNORED) == (IGNORED if text == "zebra" or task == "causal_lm" else 0)


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


def test_an_example_without_a_target_has_no_loss_and_no_gradient() -> None:
    """The sum over examples is what it is without it, for every task."""
    ids, generator = torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.Generator().manual_seed(0)
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}
    shapes = {"classification": (2, 4), "regression": (2, 1), "causal_lm": (2, 3, 9)}
    for name, task in TASKS.items():
        outputs = torch.randn(shapes[name], generator=generator, requires_grad=True)
        losses = task.losses(outputs, {**batch, "targets": task.target_tensor([1, task.no_target])})
        losses.sum().backward()
        losses = losses.detach()
        assert outputs.grad is not None
        assert float(losses[0]) > 0
        assert float(losses[1]) == 0
        assert bool(outputs.grad[0].any())
        assert not outputs.grad[1].any()


def test_a_row_that_the_tokenizer_refuses_does_not_have_the_others_read_one_by_one(tmp_path: Path) -> None:
    """Refused rows are found by halves, and named."""
    rows = PrivateRows(Examples(tuple(f"goal {i}" for i in range(64))), {})
    calls: list[int] = []

    def tokenised(examples: Examples) -> list[dict[str, Any]]:
        calls.append(len(examples))
        if any(text in ("goal 7", "goal 40") for text in examples.texts):
            raise TypeError("no")
        return [{"input_ids": [int(text.split()[1]) if text else 99]} for text in examples.texts]

    found = private_features(rows, 8, tokenised, no_target=math.nan)
    assert [row["input_ids"] for row in found] == [[99 if i in (7, 40) else i] for i in range(64)]
    assert len(calls) <= 2 * 2 * 7
