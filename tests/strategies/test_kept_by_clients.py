"""Clients that keep something of their own: they go on from what counted, wherever a run goes, and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from shlex import join
from typing import Any

import pytest
from flwr.app import Context, Message

from fedsb.adapters import SPECS
from fedsb.client_app import app as client_app
from fedsb.client_stack import answer_together
from fedsb.config.compose import load
from fedsb.core.errors import RunError
from fedsb.core.rng import numpy_generator
from fedsb.privacy.codes import CODES
from fedsb.run.folder import read_run
from fedsb.run.records import RoundRecord
from fedsb.run.resuming import resumed
from fedsb.runtime.grid import simulated_nodes
from fedsb.runtime.local import LocalGrid
from fedsb.server_app import serve
from strategies import STRATEGIES
from tests.strategies.federations import ClientCall, named
from tests.strategies.private_runs import small, write_table

# What clients keep: factors of their own, and what a wire of int8 has left out of their uploads.
OWN = {method: (f"method={method}",) for method in STRATEGIES if SPECS[load([f"method={method}"]).method.adapter].own}
OWN |= {"int8": ("method=fedavg_lora", "federation.wire_dtype=int8")}
ROUNDS = "federation.num_rounds=6"
REMARK = "client-2: it begins anew, for what it kept of its own in round 2 is not there (federation.lost_state=anew)"
Before = Callable[[str, int], None]


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))


def asked(message: Message) -> tuple[str, int]:
    told = message.content.config_records["config"]
    return (str(told["client"]), int(told["round"])) if message.metadata.message_type == "train" else ("", 0)  # type: ignore[arg-type]


def failing(pairs: Collection[tuple[str, int]], *, late: bool) -> ClientCall:
    """Return clients that fail in rounds of theirs, before they have trained or after."""

    def call(message: Message, context: Context) -> Message:
        if asked(message) not in pairs:
            return client_app(message, context)
        if late:
            client_app(message, context)
        raise RuntimeError("no reply")

    return call


def run(
    folder: Path,
    overrides: list[str],
    app: ClientCall = client_app,
    *,
    before: Before = lambda client, number: None,
    nodes: dict[int, dict[str, Any]] | None = None,
    stack: int = 1,
) -> dict[str, Any]:
    """Run a federation; ``before`` happens to the clients' disks before a client trains in a round."""

    def alone(message: Message, context: Context) -> Message:
        before(*asked(message))
        return app(message, context)

    def together(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        for message in messages:
            before(*asked(message))
        return answer_together(messages, contexts)

    config = resumed(load(overrides), overrides)
    run_config = {"overrides": join(overrides), "output": str(folder)}
    grid = LocalGrid(alone, run_config, nodes or simulated_nodes(), stack=stack, together=together)
    return serve(config, grid, folder, overrides=overrides)


def told(folder: Path) -> list[dict[str, Any]]:
    """Return what clients said of themselves, and who took part, by round."""
    return [{"metrics": record.client_metrics, "clients": record.clients} for record in records(folder)]


def records(folder: Path) -> tuple[RoundRecord, ...]:
    return read_run(folder).records


def losing(client: str, number: int, folder: Path) -> Before:
    """Return what takes a client's disk away before a round of its."""

    def lose(who: str, when: int) -> None:
        if (who, when) == (client, number):
            for path in folder.rglob("round-*.safetensors"):
                if path.parent.name.startswith(client):
                    path.unlink()

    return lose


@pytest.mark.parametrize("method", OWN)
def test_an_upload_that_did_not_count_moves_nobodys_own(method: str, tiny_bert: Path, tmp_path: Path) -> None:
    """It is the same whether a client fails before it has trained, and has nothing to keep, or after."""
    overrides = small(tiny_bert, tmp_path, *OWN[method], ROUNDS)
    draw = numpy_generator(0, "late", method)
    pairs = {(f"client-{client}", number) for client in range(1, 4) for number in range(1, 7) if draw.random() < 0.4}
    whole = run(tmp_path / "early", overrides, failing(pairs, late=False))
    again = run(tmp_path / "late", overrides, failing(pairs, late=True))
    assert again["factors_sha256"] == whole["factors_sha256"]
    assert told(tmp_path / "late") == told(tmp_path / "early")
    assert whole["failures"] == len(pairs) > 4


@pytest.mark.parametrize("method", OWN)
@pytest.mark.parametrize("damaged", [1, 2])
def test_clients_go_back_with_a_run_that_goes_back(damaged: int, method: str, tiny_bert: Path, tmp_path: Path) -> None:
    overrides = small(tiny_bert, tmp_path, *OWN[method], ROUNDS, "federation.fraction=0.5", "keep_checkpoints=3")
    whole = run(tmp_path / "whole", overrides)

    def end(client: str, number: int) -> None:
        if number == 6:
            raise KeyboardInterrupt

    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(folder, overrides, before=end)
    for path in sorted((folder / "checkpoints").glob("round-*"))[-damaged:]:
        path.write_bytes(b"")
    again = run(folder, [f"resume={folder}"])
    assert again["factors_sha256"] == whole["factors_sha256"]
    assert told(folder) == told(tmp_path / "whole")


@pytest.mark.parametrize("method", OWN)
@pytest.mark.parametrize("stack", [1, 4])
def test_a_simulated_client_whose_own_is_gone_is_refused_or_begins_anew(
    stack: int, method: str, tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = small(tiny_bert, tmp_path, *OWN[method], "federation.num_rounds=3", f"runtime.stack={stack}")
    lose = losing("client-2", 3, tmp_path)
    run(tmp_path / "refused", overrides, before=lose, stack=stack)
    assert [record.failed for record in records(tmp_path / "refused")] == [{}, {}, {}, {"client-2": CODES["own_state"].text}]
    run(tmp_path / "anew", [*overrides, "federation.lost_state=anew"], before=lose, stack=stack)
    assert [record.failed for record in records(tmp_path / "anew")] == [{}] * 4
    assert [record.remarks for record in records(tmp_path / "anew")] == [(), (), (), (REMARK,)]
    assert not [line for line in caplog.messages if "side by side failed" in line]


@pytest.mark.parametrize("method", OWN)
def test_a_node_without_its_disk_stops_the_run_and_may_begin_anew(method: str, tiny_bert: Path, tmp_path: Path) -> None:
    tables = {client: write_table(tmp_path / f"{client}.csv", 20) for client in ("client-0", "client-1")}
    nodes = {number: named(client, **{"data-path": str(path)}) for number, (client, path) in enumerate(tables.items(), start=1)}
    overrides = small(tiny_bert, tmp_path, *OWN[method], "federation.num_clients=2", "federation.num_rounds=4")
    folder = tmp_path / "run"
    with pytest.raises(RunError, match=r"round 3: 1 valid replies, federation.min_replies=2 \(client-1: refused: what the client kept"):
        run(folder, overrides, before=losing("client-1", 3, tmp_path / "home"), nodes=nodes)
    with pytest.raises(RunError, match=r"let such clients begin anew by federation\.lost_state=anew"):
        run(folder, [f"resume={folder}"], nodes=nodes)
    summary = run(folder, [f"resume={folder}", "federation.lost_state=anew"], nodes=nodes)
    assert summary["failures"] == 0
    assert [record.remarks for record in records(folder) if record.remarks] == [(REMARK.replace("client-2", "client-1"),)]
