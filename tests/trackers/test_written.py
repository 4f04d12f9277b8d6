"""What real trackers have written is what metrics.jsonl holds; test_apart runs it where they are installed beside the environment."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from fedsb.run.records import RoundRecord
from fedsb.trackers import TRACKERS, Feed
from tests.report.made import make_records, make_summary

Written = Counter[tuple[str, int, float]]
LISTS = ("clients", "failed", "remarks")  # told by their lengths


def held(lines: Iterator[str]) -> Written:
    """Return each number of lines of ``metrics.jsonl``, with its round, read by nothing of the project's."""
    found: Written = Counter()
    for line in lines:
        row = json.loads(line)
        queue = [([key], value) for key, value in row.items() if key not in ("round", *LISTS)]
        queue += [([key], len(row[key])) for key in LISTS]
        for path, value in queue:
            if isinstance(value, dict):
                queue.extend(([*path, key], inner) for key, inner in value.items())
            elif type(value) in (int, float):
                found["/".join(path), row["round"], float(value)] += 1
    return found


def of_tensorboard(folder: Path) -> tuple[Written, set[float]]:
    reader = import_module("tensorboard.backend.event_processing.event_accumulator")
    value = import_module("tensorboard.util.tensor_util").make_ndarray
    found = reader.EventAccumulator(str(folder / "tensorboard"), {reader.TENSORS: 0})
    found.Reload()
    names = [name for name in found.Tags()["tensors"] if found.SummaryMetadata(name).plugin_data.plugin_name == "scalars"]
    events = [(name, event) for name in names for event in found.Tensors(name)]
    return Counter((name, event.step, float(value(event.tensor_proto))) for name, event in events), {each.wall_time for _, each in events}


def of_mlflow(folder: Path) -> tuple[Written, set[float]]:
    client = import_module("mlflow.tracking").MlflowClient(tracking_uri=(folder / "mlruns").as_uri())
    [run] = client.search_runs([each.experiment_id for each in client.search_experiments(filter_string="name = 'fedsb'")])
    rows = [each for name in run.data.metrics for each in client.get_metric_history(run.info.run_id, name)]
    return Counter((each.key, each.step, each.value) for each in rows), {float(each.timestamp) for each in rows}


def pieces(path: Path) -> Iterator[bytes]:
    """Yield the records of a LevelDB log behind a header of seven bytes, as W&B has it: blocks of 32 KiB, records in one piece or more."""
    content, at, held = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (rest := 2**15 - at % 2**15) < 7:
            at += rest
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        held += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield held
            held = b""


def of_wandb(folder: Path) -> tuple[Written, set[float]]:
    message = import_module("wandb.proto.wandb_internal_pb2").Record
    [path] = folder.glob("wandb/offline-run-*/*.wandb")
    until, told = time.monotonic() + 30, list[Any]()
    # A process of its own writes the file, and is behind.
    while not any(found.HasField("exit") for found in told) and time.monotonic() < until:
        told = [message.FromString(piece) for piece in pieces(path)]
        time.sleep(0.02)
    rows = [found.history for found in told if found.HasField("history")]
    found, stamps = Counter(), set()
    for row in rows:
        values: dict[str, Any] = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item}
        stamps.add(values["_timestamp"])
        found.update((key, values["_step"], float(value)) for key, value in values.items() if not key.startswith("_"))
    return found, stamps


READERS: dict[str, Callable[[Path], tuple[Written, set[float]]]] = {
    "tensorboard": of_tensorboard,
    "mlflow": of_mlflow,
    "wandb": of_wandb,
}


@pytest.fixture(params=READERS)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    library = pytest.importorskip(request.param, reason=f"{request.param} is not installed here")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield str(request.param)
    if request.param == "wandb":
        library.teardown()  # it reads the addresses of its servers once a process


def feed(name: str, folder: Path, before: list[RoundRecord], then: list[RoundRecord], *, whole: bool = True) -> None:
    with Feed({name: TRACKERS[name]}, folder) as feeding:
        feeding.begin(before)
        for record in then:
            feeding.record(record)
        if whole:
            feeding.finish(make_summary(make_records()))


def lines_of(records: list[RoundRecord]) -> Iterator[str]:
    return (record.to_json() for record in records)


def test_a_run_tells_each_number_of_its_records_once(
    name: str, call: Callable[..., tuple[int, str, str]], quick: list[str], tmp_path: Path
) -> None:
    measured = ("federation.evaluate_clients=true", "data.client_test_fraction=0.2", "federation.num_rounds=1")
    status, _, err = call("run", *quick, *measured, f"trackers=[{name}]", "output=run")
    assert (status, "WARNING" in err) == (0, False), err
    with (tmp_path / "run" / "metrics.jsonl").open(encoding="utf-8") as lines:
        wanted = held(lines)
    assert len(wanted) > 40
    assert READERS[name](tmp_path / "run")[0] == wanted


def test_one_that_goes_on_tells_the_rounds_of_the_process_before_it_once(name: str, tmp_path: Path) -> None:
    records = make_records()
    feed(name, tmp_path, [], records[:3], whole=False)
    if name == "wandb":  # a run of its own, at a server too
        for path in tmp_path.glob("wandb/offline-run-*/*.wandb"):
            path.rename(path.with_suffix(".first"))
    feed(name, tmp_path, records[:2], records[2:])
    assert READERS[name](tmp_path)[0] == held(lines_of(records))


def test_stamps_tell_no_time_where_a_record_tells_none(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [replace(record, wall_s=None, cpu_s=None) for record in make_records()]
    feed(name, tmp_path, [], records)
    found, stamps = READERS[name](tmp_path)
    if TRACKERS[name].dates:  # type: ignore[attr-defined]
        assert not found
        assert "stamps all with the time" in caplog.text
    else:
        assert found == held(lines_of(records))
        assert len(stamps) == 1


@pytest.mark.parametrize("name", ["mlflow", "wandb"], indirect=True)
def test_a_server_that_does_not_answer_costs_one_warning(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    away = {
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "WANDB_MODE": "online",
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_API_KEY": "a" * 40,
    }
    for key, value in away.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("fedsb.trackers.wandb.WAIT_S", 2.0)
    feed(name, tmp_path, [], make_records())
    said = [record.getMessage() for record in caplog.records if record.name.startswith("fedsb")]
    assert len(said) == 1
    assert said[0].startswith(f"tracker {name} failed (")


class Answers(BaseHTTPRequestHandler):
    """As much of W&B's server as a run's begin needs."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        project = {"id": "p", "name": "fedsb", "entity": {"id": "e", "name": "me"}}
        begun = {"bucket": {"id": "b", "name": "r", "displayName": "r", "config": "{}", "project": project}, "inserted": True}
        body = json.dumps({"data": {"upsertBucket": begun}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


@pytest.mark.parametrize("name", ["wandb"], indirect=True)
def test_a_server_that_goes_in_the_middle_of_a_run_is_not_waited_for_at_its_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    server, records = ThreadingHTTPServer(("127.0.0.1", 0), Answers), make_records()
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    for key, value in {"WANDB_MODE": "online", "WANDB_BASE_URL": address, "WANDB_API_KEY": "a" * 40}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("fedsb.trackers.wandb.LEFT_S", 2.0)
    with Feed({name: TRACKERS[name]}, tmp_path) as feeding:
        feeding.begin(records[:1])
        server.shutdown()
        server.server_close()
        for record in records[1:]:
            feeding.record(record)
        feeding.finish(make_summary(records))
        since = time.monotonic()
    assert time.monotonic() - since < 20
    [said] = [record.getMessage() for record in caplog.records if record.name.startswith("fedsb")]
    assert said.startswith("tracker wandb failed (TimeoutError")
    assert capfd.readouterr().err == ""  # and no other warning


@pytest.mark.parametrize("name", ["mlflow"], indirect=True)
def test_a_server_that_takes_what_is_asked_and_answers_nothing_is_not_waited_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
        monkeypatch.setattr("fedsb.trackers.mlflow.WAIT_S", "1")
        since = time.monotonic()
        feed(name, tmp_path, [], make_records())
    assert time.monotonic() - since < 30
    assert len([record for record in caplog.records if record.name.startswith("fedsb")]) == 1
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)


@pytest.mark.parametrize("name", ["mlflow"], indirect=True)
def test_runs_that_begin_at_once_share_an_experiment(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of a sweep with one store: each finds none, and one of them is too late to make it."""
    address, look = (tmp_path / "store").as_uri(), import_module("mlflow.tracking").MlflowClient.get_experiment_by_name
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    looks = Counter[str]()

    def late(client: Any, wanted: str) -> Any:
        looks[wanted] += 1
        if looks[wanted] == 1:
            client.create_experiment(wanted)  # as another does, once this one has looked
            return None
        return look(client, wanted)

    monkeypatch.setattr("mlflow.tracking.MlflowClient.get_experiment_by_name", late)
    for job in ("a", "b"):
        (tmp_path / job).mkdir()
        feed(name, tmp_path / job, [], make_records())
    client = import_module("mlflow.tracking").MlflowClient(tracking_uri=address)
    [experiment] = client.search_experiments(filter_string="name = 'fedsb'")
    assert {run.info.run_name for run in client.search_runs([experiment.experiment_id])} == {"a", "b"}
