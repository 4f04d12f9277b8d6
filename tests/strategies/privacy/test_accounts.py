"""What a real node's account holds: all runs on the same rows, whatever they are called, and those that had no noise too."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from flwr.app import Context, Message

from fedsb.app.assembly import home
from fedsb.client_app import app as client_app
from fedsb.core.errors import RunError
from tests.strategies.federations import ClientCall, named
from tests.strategies.private_runs import CLIENT, EXAMPLE, Finished, run_privately, small, write_table

ONE = ("federation.num_clients=1", "federation.names=[a]", "federation.num_rounds=1")
RUNS = count(100)


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path))


def in_run(number: int) -> ClientCall:
    """Return the ClientApp in a run of its own: to the same run a client would give the reply that it kept."""

    def call(message: Message, context: Context) -> Message:
        return client_app(message, Context(number, context.node_id, context.node_config, context.state, context.run_config))

    return call


def run(bert: Path, folder: Path, data: object, *more: str, privacy: tuple[str, ...] = EXAMPLE) -> Finished:
    """Run over one node."""
    number = next(RUNS)
    nodes = {1: named("a", **{"data-path": str(data)})}
    return run_privately(small(bert, folder, *ONE, *privacy, *more), folder / f"run-{number}", app=in_run(number), nodes=nodes)


def spent(found: Finished) -> float:
    assert found.error is None
    return float(found.claim.epsilon(simulated=False)["max"])


def ways(site: Path, folder: Path) -> Iterator[object]:
    """Make other ways to the same rows, one after the other."""
    yield "~/data/a.csv"
    (folder / "link.csv").symlink_to(site)
    yield folder / "link.csv"
    yield site.parent
    os.link(site, folder / "hard.csv")
    yield folder / "hard.csv"
    lines = site.read_text().splitlines()
    (folder / "copy.csv").write_text("\n".join([lines[0], "one row more,film", *reversed(lines[1:])]))
    yield folder / "copy.csv"


def test_no_way_to_name_the_same_rows_begins_their_account_anew(tiny_bert: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    site = write_table(tmp_path / "data" / "a.csv", 40)
    first = before = spent(run(tiny_bert, tmp_path, site))
    for way in ways(site, tmp_path):
        after = spent(run(tiny_bert, tmp_path, way))
        assert after > before, way
        before = after
    other = write_table(tmp_path / "other.csv", 40, lambda i, label: f"nobody else's text {i}")
    assert spent(run(tiny_bert, tmp_path, other)) == first < before


@pytest.mark.parametrize(
    "privacy", [("privacy=none", "init.kind=gradient", "init.num_examples=4"), (*CLIENT, "init.kind=weight_svd")], ids=["none", "client"]
)
def test_a_run_without_noise_at_the_client_leaves_a_line_and_takes_later_claims_away(
    privacy: tuple[str, ...], tiny_bert: Path, tmp_path: Path
) -> None:
    site = write_table(tmp_path / "a.csv", 40)
    assert run(tiny_bert, tmp_path, site, "federation.num_rounds=2", privacy=privacy).error is None
    (ledger,) = (home() / "ledgers").glob("*/ledger.jsonl")
    keys = [json.loads(line)["key"][1:] for line in ledger.read_text().splitlines()[1:]]
    assert keys == [[0, "answers", "a"]]  # one line, whatever was asked
    shutil.copy(site, tmp_path / "copy.csv")
    for path in (site, tmp_path / "copy.csv"):
        after = run(tiny_bert, tmp_path, path)
        assert after.claim.epsilon(simulated=False) is None
        assert "a release of this or an earlier run on that data had no noise" in after.claim.why_none()


def test_two_clients_of_one_run_on_one_file_get_noise_of_their_own(tiny_bert: Path, tmp_path: Path) -> None:
    """One kept reply for both would count its noise twice in the mean, and one charge would be half of the truth."""
    site = write_table(tmp_path / "a.csv", 40)
    nodes = {number: named(client, **{"data-path": str(site)}) for number, client in enumerate("ab", start=1)}
    two = ("federation.num_clients=2", "federation.names=[a,b]", "federation.num_rounds=1")
    found = run_privately(small(tiny_bert, tmp_path, *two, *EXAMPLE), tmp_path / "run", nodes=nodes)
    one, other = (next(iter(exchange.answer.flats.values())) for exchange in found.grid.exchanges)
    assert (one != other).any()
    (ledger,) = (home() / "ledgers").glob("*/ledger.jsonl")
    assert sorted(json.loads(line)["key"][3] for line in ledger.read_text().splitlines()[1:]) == ["a", "b"]
    assert len(json.loads((ledger.parent / "plans.json").read_text())) == 2


@pytest.mark.parametrize("privacy", [EXAMPLE, CLIENT], ids=["example", "client"])
def test_records_of_real_nodes_tell_neither_times_nor_who_holds_more(privacy: tuple[str, ...], tiny_bert: Path, tmp_path: Path) -> None:
    sizes = {"a": 25, "b": 60, "c": 40}
    paths = {c: write_table(tmp_path / f"{c}.csv", n, lambda i, label, c=c: f"{c} {i}") for c, n in sizes.items()}  # type: ignore[misc]
    nodes = {n: named(client, **{"data-path": str(path)}) for n, (client, path) in enumerate(paths.items(), start=1)}
    three = ("federation.num_clients=3", "federation.names=[a,b,c]", "federation.num_rounds=1")
    found = run_privately(small(tiny_bert, tmp_path, *three, *privacy), tmp_path / "run", nodes=nodes)
    assert [exchange.instruction.client for exchange in found.grid.exchanges] == ["b", "c", "a"]
    last = found.records[-1]
    assert (last.clients, last.wall_s, last.cpu_s) == (("a", "b", "c"), None, None)
    assert " s" not in found.printed.splitlines()[-1].rpartition("epsilon")[2]
    assert ("the time of a reply" if privacy is EXAMPLE else "other runs with the same clients") in found.claim.final(simulated=False)[
        "not_covered"
    ]


def test_a_simulation_keeps_its_times(tiny_bert: Path, tmp_path: Path) -> None:
    last = run_privately(small(tiny_bert, tmp_path, *EXAMPLE, "federation.num_rounds=1"), tmp_path / "run").records[-1]
    assert last.wall_s is not None
    assert last.wall_s > 0


def test_a_node_without_a_name_gives_nothing_with_noise_of_the_public_seed(
    tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = small(tiny_bert, tmp_path, *EXAMPLE, "federation.num_rounds=1")
    said = r"the node's own configuration \(--node-config, or the file that it names\) cannot be used.*\(key at fault: client\)"
    with pytest.raises(RunError, match=said):
        run_privately(overrides, tmp_path / "bare", nodes={1: {}})
    assert "this node names no client; start it with --node-config" in caplog.text


@pytest.mark.parametrize(
    ("privacy", "delta", "said"),
    [
        (EXAMPLE, 0.2 / 20, "is above 0.1/n for the 20 examples of a client"),
        (CLIENT, 0.2 / 4, "is above 0.1/n for the 4 clients"),
        (EXAMPLE, 0.1 / 20, None),
    ],
)
def test_a_delta_that_says_little_is_warned_of_before_the_run(
    privacy: tuple[str, ...], delta: float, said: str | None, tiny_bert: Path, tmp_path: Path
) -> None:
    printed = run_privately(
        small(tiny_bert, tmp_path, *privacy, f"privacy.delta={delta}", "federation.num_rounds=1"), tmp_path / "run"
    ).printed
    assert ("privacy: warning: delta" in printed) is (said is not None)
    assert (said or "") in printed
