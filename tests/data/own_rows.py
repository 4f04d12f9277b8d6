"""What the laws of private rows share: a node's own file, drawn lines, and a line put in place of another."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from fedsb.app.assembly import _MEMO
from fedsb.app.client_data import client_features, num_examples
from fedsb.config.schema import Config

LABELS = ("film", "sport", "trade")
GOOD = [(f'the "goal", said number {i}' if i % 2 else f"a new actor {i}", LABELS[i % 3]) for i in range(7)]
Configure = Callable[..., Config]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)
CELLS = st.one_of(JSON, st.sampled_from([10**400, "9" * 5000, "\ud800", "x" * 200_000, "", " ", math.nan, *LABELS]))
LINES = st.text().map(lambda text: text.replace("\n", " "))
EXAMPLES = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


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
