"""What may cross between a server and its nodes, by an explicit list of its own, and what must be found in no byte of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message
from flwr.common.serde import recorddict_to_proto
from transformers import AutoTokenizer

from fedsb.client_app import app as client_app
from fedsb.privacy.rows import HASH_BYTES

NUMBER, WORDS, NUMBERS = (int, float), (str,), (list,)
ACCOUNT = ("epsilon", "delta", "sampling-rate", "noise-multiplier", "steps")
COUNTED = ("num-examples", "layout")
MEASURED = ("loss", "accuracy", "macro_f1", "matthews")
NOISED = ("accuracy", "clipped_loss", "noise")
TOLD: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("client", "stage", "frozen", "labels", "origin", "parent", "bundle"), WORDS),
    **dict.fromkeys(("round", "layout", "own"), (int,)),
    "start": NUMBERS,
    **dict.fromkeys(("members", "weights"), NUMBERS),  # of a secure sum
    "bound": (float,),
}
SUMMED = ("train.keys", "train.shares", "train.survivors", "train.unmask")
ASKED: dict[str, dict[str, tuple[type, ...]]] = {
    "query.describe": {"clients": WORDS, "labels": WORDS, "flwr": WORDS},
    "query.notice": {"notice": WORDS},
    **dict.fromkeys(("train", "train.evidence", "evaluate", *SUMMED), TOLD),
}
# kind -> metrics of a plain reply, and of one under privacy.unit=example.
ANSWERED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "query.describe": (("num-examples",), ("num-examples",)),
    "query.notice": ((), ()),
    "train.evidence": (COUNTED, (*COUNTED, *ACCOUNT)),
    "train": ((*COUNTED, "loss", "steps"), (*COUNTED, *ACCOUNT)),
    **dict.fromkeys(SUMMED, (COUNTED, COUNTED)),
    "evaluate": ((*COUNTED, *MEASURED), (*COUNTED, *NOISED, *ACCOUNT)),
}
# Each one flat array: float32, but for what belongs to a secure sum.
GROUPS = {**dict.fromkeys(("trained", "head", "frozen", "range", "core"), "float32"), "masked:uint32": "uint32", "sealed:uint8": "uint8"}
DESCRIBED = {"client", "counted", "resident"}


@dataclass
class Crossing:
    """The ClientApp that the server ships, with all that goes in and comes out."""

    seen: list[tuple[Message, Message]] = field(default_factory=list)
    run: str | None = None  # what all runs are said to be, where they are to be one

    def __call__(self, message: Message, context: Context) -> Message:
        told = message.content.config_records.get("config") or {}
        if self.run is not None and "origin" in told:
            told["origin"] = self.run  # type: ignore[index]
        reply = client_app(message, context)
        self.seen.append((message, reply))
        return reply

    @property
    def kinds(self) -> set[str]:
        return {message.metadata.message_type for message, _ in self.seen}


def hold(crossing: Crossing, *, private: bool, labels: Sequence[str], clients: Sequence[str]) -> int:
    """Hold each message to the lists: records, keys, types; arrays are flat and float32. Return how many values an upload has."""
    sizes: dict[str, set[int]] = {}
    for message, reply in crossing.seen:
        kind = message.metadata.message_type
        asked, answered = message.content, reply.content
        assert set(asked) <= {"arrays", "config"}, kind
        for key, value in asked.config_records["config"].items():
            assert isinstance(value, ASKED[kind][key]), (kind, key)
        assert not reply.has_error()
        assert set(answered) <= {"arrays", "metrics", *(["config"] if kind == "query.describe" else [])}, kind
        allowed = {*ANSWERED[kind][private]}
        if "metrics" in answered.metric_records:
            found = dict(answered.metric_records["metrics"])
            assert set(found) == allowed, kind
            assert all(isinstance(value, NUMBER) for value in found.values()) or kind == "query.describe"
        for key, value in (answered.config_records.get("config") or ConfigRecord()).items():
            assert key in DESCRIBED
            assert key == "resident" or value in clients or set(json.loads(str(value))) <= {*clients}
        for record in (*asked.array_records.values(), *answered.array_records.values()):
            assert all(flat(array, GROUPS.get(key, "float32")) for key, array in record.items()), kind
        if kind == "train":
            for key, array in answered.array_records["arrays"].items():
                assert key in GROUPS
                sizes.setdefault(key, set()).add(int(array.shape[0]))
    assert all(len(found) == 1 for found in sizes.values())
    words = {word for message, _ in crossing.seen for word in json.loads(str(message.content["config"].get("labels", "[]")))}
    assert words <= {*labels}
    return sum(size for found in sizes.values() for size in found)


def flat(array: Any, dtype: str) -> bool:
    return (array.dtype, array.stype, len(array.shape)) == (dtype, "numpy.ndarray", 1)


def serialised(crossing: Crossing) -> bytes:
    """Return all bytes of all messages, one after the other."""
    return b"".join(
        recorddict_to_proto(content).SerializeToString() for pair in crossing.seen for content in (pair[0].content, pair[1].content)
    )


def traces(rows: Iterable[str], tokens: Iterable[Sequence[int]], ledgers: Path) -> Iterator[bytes]:
    """Yield what is in no byte that crosses: each text as it may be written, its tokens as numbers, the ledger's hashes and their salt."""
    for row in rows:
        yield from (row.encode(), row.encode("utf-16-le"), json.dumps(row)[1:-1].encode())
    for ids in tokens:
        yield from (np.asarray(ids, dtype).tobytes() for dtype in ("<i2", "<i4", "<i8", "<f4"))
        yield ", ".join(map(str, ids)).encode()
    for path in ledgers.glob("*/rows"):
        content = path.read_bytes()
        for start in range(0, len(content), HASH_BYTES):
            yield content[start : start + HASH_BYTES]
            yield content[start : start + HASH_BYTES].hex().encode()
    salt = (ledgers / "salt").read_text().strip()
    assert re.fullmatch(r"[0-9a-f]{64}", salt)
    yield from (salt.encode(), bytes.fromhex(salt))


def hold_nothing_of_the_data(crossing: Crossing, model: Path, data: Iterable[Path], home: Path) -> None:
    """Look for the rows of some folders, and for what the ledger of a home keeps of them, in all that has crossed."""
    files = [file for path in data for file in sorted(path.glob("*.jsonl"))]
    rows = [json.loads(line)["text"] for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    found = [*traces(rows, AutoTokenizer.from_pretrained(model)(rows, add_special_tokens=False)["input_ids"], home / "ledgers")]
    assert len(rows) > 20
    assert len(found) > 8 * len(rows)
    content = serialised(crossing)
    assert not [trace for trace in found if trace in content]
