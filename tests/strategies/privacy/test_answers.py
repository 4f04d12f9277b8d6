"""What a node answers under example-level privacy tells nothing of a single row: one flipped to anything changes no kind and no figure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shlex import join
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsb.app.assembly import _MEMO
from fedsb.client_app import app as client_app
from fedsb.core.folders import home
from fedsb.data import places_held
from fedsb.privacy.codes import CODES
from fedsb.privacy.entries import UNNOISED, read_entry
from fedsb.runtime.grid import context_of
from fedsb.wire.arrays import decode_arrays
from tests.strategies.federations import KeepingGrid, named
from tests.strategies.private_runs import EXAMPLE, Watch, metrics_of, run_privately, small

ROWS, HELD = 8, (3, 5)  # of which these places are held out
MEASURED = ("federation.evaluate_clients=true", "data.client_test_fraction=0.25", "privacy.eval_fraction=0.3")
NOISED = ("accuracy", "clipped_loss")
START = ("init.kind=gradient", "init.power_iterations=0", "init.num_examples=8", "privacy.init_fraction=0.3")
TASKS: dict[str, tuple[str, ...]] = {
    "classification": ("data.labels=[film,sport,trade]",),
    "regression": ("data.task=regression",),
    "causal_lm": ("data.task=causal_lm", "data.label=null"),
    "instructions": ("data.task=causal_lm", "data.prompt=text", "data.response=label"),
}
TARGETS: dict[str, Sequence[Any]] = {
    "classification": ("film", "sport", "trade"),
    "regression": (0.5, -100.0, 3),
    "causal_lm": ("",),
    "instructions": ("a film", "said", "the old team"),
}
ODD: dict[str, str] = {
    "another label": '{"text": "he said", "label": "hiv"}',
    "no label": '{"text": "he said", "label": null}',
    "a list for a label": '{"text": "he said", "label": ["film"]}',
    "an empty text": '{"text": "", "label": "film"}',
    "a list for a text": '{"text": ["he", "said"], "label": 3}',
    "numbers": '{"text": 3, "label": 3}',
    "not a number": '{"text": "he said", "label": NaN}',
    "the largest number": '{"text": "he said", "label": 3.4e38}',
    "beyond float32": '{"text": "he said", "label": 1e300}',
    "beyond a tensor": '{"text": "he said", "label": %s}' % ("9" * 400),
    "gigantic": json.dumps({"text": "goal " * 200_000, "label": "film"}),
    "nothing that is a word": json.dumps({"text": "\u200b\x00\ufffd", "label": "film"}),
    "half of a character": '{"text": "\\ud800", "label": "film"}',
    "no object": '"he said"',
    "no JSON": "{",
    "nothing": "",
}  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
CELLS = st.one_of(JSON, st.sampled_from(["film", "[PAD]", "</s>", "he said", -0.5, math.inf, 3e38, -3e38, 1e-45]))
LINES = st.text().map(lambda text: text.replace("\n", " ")) | st.fixed_dictionaries({"text": CELLS, "label": CELLS}).map(json.dumps)
Said = tuple[str, tuple[str, ...], dict[str, Any], dict[str, tuple[int, ...]]]


def rows_of(task: str) -> list[str]:
    targets = TARGETS[task]
    return [json.dumps({"text": f"a new goal {'said ' * i}", "label": targets[i % len(targets)]}) for i in range(ROWS)]


def written(folder: Path, task: str, places: Sequence[int] = (), line: str = "") -> Path:
    lines = [line if place in places else row for place, row in enumerate(rows_of(task))]
    (folder / "a.jsonl").write_bytes("".join(f"{row}\n" for row in lines).encode("utf-8", "surrogatepass"))
    return folder / "a.jsonl"


def said_in(reply: Message) -> Said:
    """Return what a reply says beside its noise: the kind of message, its records, its metrics without noised values, its shapes."""
    records = reply.content.array_records
    shapes = {key: tuple(flat.shape) for key, flat in decode_arrays(records["arrays"]).items()} if records else {}
    metrics = {key: None if key in NOISED else value for key, value in metrics_of(reply).items()}
    return reply.metadata.message_type, tuple(sorted(reply.content)), metrics, shapes


@dataclass(frozen=True)
class Play:
    """A node's run: what it is asked for, and what it says where all of its rows can be used."""

    task: str
    overrides: str
    asked: tuple[Message, ...]
    said: tuple[Said, ...]

    def again(self, places: Sequence[int], line: str) -> tuple[Said, ...]:
        """Return what a node says whose data have rows replaced; it has a home of its own, and a process that has read nothing yet."""
        for kind in ("features", "private site"):
            _MEMO.pop(kind, None)
        with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.setenv("FEDSB_HOME", f"{folder}/home")
            node = named("a", **{"data-path": str(written(Path(folder), self.task, places, line))})
            context = context_of(1, node, {"overrides": self.overrides})
            return tuple(said_in(client_app(message, context)) for message in self.asked)


@pytest.fixture(scope="module")
def played(tiny_bert: Path, tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Play]:
    @cache
    def play(task: str) -> Play:
        folder = tmp_path_factory.mktemp(task)
        data = written(folder, task)
        one = ("federation.num_clients=1", "federation.names=[a]", "federation.num_rounds=1", f"data.test_path='{data}'", "data.path=null")
        # Every example is in every batch: what a row does, it does.
        sizes = (f"train.batch_size={ROWS - len(HELD)}", "train.local_steps=1", "init.micro_batch=3", *TASKS[task], *one)
        whole = small(tiny_gpt2 if "data.task=causal_lm" in TASKS[task] else tiny_bert, folder, *EXAMPLE, *START, *MEASURED, *sizes)
        overrides = [word for word in whole if not word.startswith("data.path='")]
        watch = Watch(client_app)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FEDSB_HOME", str(folder / "home"))
            run = run_privately(overrides, folder / "run", app=watch, nodes={1: named("a", **{"data-path": str(data)})})
            assert run.error is None
            assert tuple(places_held(ROWS, 0.25, seed=run.config.seed, client="a")) == HELD
            asked, said = zip(*watch.seen, strict=True)
        return Play(task, join(overrides), asked, tuple(map(said_in, said)))

    return play


@pytest.mark.parametrize("task", TASKS)
def test_a_node_answers_each_question(task: str, played: Callable[[str], Play]) -> None:
    described, first, second, trained, evaluated = played(task).said
    assert described == ("query.describe", ("config", "metrics"), {"num-examples": [ROWS - len(HELD)]}, {})
    for kind, records, metrics, shapes in (first, second, trained):
        assert kind in ("train.evidence", "train")
        assert records == ("arrays", "metrics")
        assert metrics["num-examples"] == ROWS - len(HELD)
        assert metrics["epsilon"] > 0
        assert shapes
    kind, _, metrics, shapes = evaluated
    assert (kind, metrics["num-examples"], shapes) == ("evaluate", len(HELD), {})
    assert set(NOISED[task != "classification" :]) | {"noise", "epsilon"} <= set(metrics)


@pytest.mark.parametrize("what", ODD)
@pytest.mark.parametrize("task", TASKS)
def test_an_odd_row_changes_no_kind_and_no_figure_of_a_reply(task: str, what: str, played: Callable[[str], Play]) -> None:
    """One that is trained on, and one that is held out."""
    play = played(task)
    assert play.again((0, HELD[0]), ODD[what]) == play.said


@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=8)
@given(place=st.integers(0, ROWS - 1), line=LINES)
def test_a_row_flipped_to_anything_changes_no_kind_and_no_figure_of_a_reply(
    task: str, place: int, line: str, played: Callable[[str], Play]
) -> None:
    play = played(task)
    assert play.again((place,), line) == play.said


def test_a_question_about_labels_is_answered_with_the_number_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the server calls the classes, and nothing is charged for it."""
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    lines = [json.dumps({"text": "he said", "label": "hiv" if i == 9 else "flu"}) for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(f"{line}\n" for line in lines))
    node = named("a", **{"data-path": str(tmp_path / "a.jsonl")})
    for labels in ("flu", "hiv", "cancer"):
        for column in ("label", "elsewhere"):
            over = [
                "data=files",
                "federation.names=[a]",
                "federation.num_clients=1",
                *EXAMPLE,
                f"data.labels=[x,{labels}]",
                f"data.label={column}",
            ]
            grid = KeepingGrid(client_app, {"overrides": join(over)}, {1: node})
            ask = Message(RecordDict({"config": ConfigRecord({"clients": "[]", "labels": json.dumps(["x", labels])})}), 1, "query.describe")
            [reply] = grid.send_and_receive([ask], timeout=60)
            assert metrics_of(reply) == {"num-examples": [20]}
    assert not (home() / "ledgers").exists()


@pytest.mark.parametrize("labels", [["flu", "hiv"], ["flu", "cancer"]])
@pytest.mark.parametrize("privacy", ["none", "client"])
@pytest.mark.parametrize("serves", ["a", "b"])
def test_what_a_run_without_noise_is_told_is_in_the_ledger_whatever_it_is(
    serves: str, privacy: str, labels: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A count, or a refusal: a later run on that data claims nothing. A node of no client of the run looks at nothing."""
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    lines = [json.dumps({"text": f"he said {i}", "label": "hiv" if i == 9 else "flu"}) for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(f"{line}\n" for line in lines))
    node = named(serves, **{"data-path": str(tmp_path / "a.jsonl")})
    over = ["data=files", "federation.names=[a]", "federation.num_clients=1"]
    over += ["privacy=client", "privacy.noise_multiplier=2", "federation.weighting=uniform"] if privacy == "client" else []
    grid = KeepingGrid(client_app, {"overrides": join(over)}, {1: node})
    for _ in range(2):
        ask = Message(RecordDict({"config": ConfigRecord({"clients": "[]", "labels": json.dumps(labels)})}), 1, "query.describe")
        [reply] = grid.send_and_receive([ask], timeout=60)
    charged = [path.read_text().splitlines()[1:] for path in (home() / "ledgers").glob("*/ledger.jsonl")]
    if serves == "b":
        assert metrics_of(reply) == {"num-examples": [0]}
        assert not charged
    else:
        assert metrics_of(reply) == ({"num-examples": [20]} if "hiv" in labels else {"code": CODES["refused"].number})
        assert [[read_entry(entry) for line in lines for entry in json.loads(line)["entries"]] for lines in charged] == [[UNNOISED]]
