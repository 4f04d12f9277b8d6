"""A run or sweep under way is seen from its records alone: at any time, whatever is half written, and without a trace in its folder."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from fedsb.core.errors import UserError
from fedsb.run.folder import RunFolder
from fedsb.run.records import RoundRecord
from fedsb.sweep.watching import Seen, Watch, board, counts_text, is_over, left_s
from tests.commands.calls import Call, first_line
from tests.report.made import make_config, make_records, make_summary
from tests.report.pages import data_of

ROUNDS = 3


def begin(folder: Path, records: int = 0) -> RunFolder:
    run = RunFolder(folder)
    run.write_config(yaml.safe_dump(make_config("fed_sb", 16, 0, ROUNDS)))
    for record in make_records(rounds=ROUNDS)[:records]:
        run.append(record)
    return run


def finish(run: RunFolder) -> None:
    run.write_summary(make_summary(make_records(rounds=ROUNDS), rounds=ROUNDS))


def lay_sweep(folder: Path) -> None:
    """Lay a sweep of five jobs: one finished, one under way, one failed, one begun and cut within a line, one waiting."""
    finish(begin(folder / "a", 4))
    begin(folder / "b", 3)
    begin(folder / "c", 1)
    with begin(folder / "d", 2).metrics.open("a") as file:
        file.write('{"round": 2, "cli')
    states = {"a": "finished", "b": "running", "c": "failed", "d": "interrupted", "e": "waiting"}
    jobs = [{"name": name, "label": f"job={name}", "state": state} for name, state in states.items()]
    jobs[2]["reason"] = "no space left"
    (folder / "manifest.json").write_text(json.dumps({"jobs": jobs}))


def print_of(folder: Path, seen: list[Seen], most: int | None = None) -> str:
    console = Console(width=160, no_color=True)
    with console.capture() as capture:
        console.print(board(folder, seen, most))
    return capture.get()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_each_job_is_seen_as_it_stands_and_nothing_is_touched(tmp_path: Path) -> None:
    lay_sweep(tmp_path)
    before = contents(tmp_path)
    seen = Watch(tmp_path).look()
    assert [(each.label, each.state, each.done) for each in seen] == [
        ("job=a", "finished", 3), ("job=b", "running", 2), ("job=c", "failed", 0), ("job=d", "interrupted", 1), ("job=e", "waiting", 0),
    ]  # fmt: skip
    text = print_of(tmp_path, seen)
    assert [line.split()[0] for line in text.splitlines()[2:7]] == ["job=b", "job=c", "job=d", "job=a", "job=e"]
    assert "no space left" in text
    assert "accuracy 0.923" in text
    assert "1 running, 1 failed, 1 interrupted, 1 finished, 1 waiting; all in " in counts_text(seen)
    assert "and 1 interrupted, 1 finished, 1 waiting more" in print_of(tmp_path, seen, 3)
    assert not is_over(seen)
    assert contents(tmp_path) == before


def test_what_is_left_is_told_by_the_rounds_so_far_and_the_jobs_before() -> None:
    """By hand: 10 s a round; the one under way has 2 of 4 rounds left, the two that wait take as long as the finished one did."""
    rounds = [RoundRecord(i, wall_s=10.0 if i else 0.0) for i in range(5)]
    whole, half = Seen("a", "finished", 4, tuple(rounds)), Seen("b", "running", 4, tuple(rounds[:3]))
    waiting = [Seen(name, "waiting") for name in "cd"]
    assert left_s([whole, half, *waiting]) == pytest.approx(20 + 2 * 40)
    assert left_s([half]) == pytest.approx(20)
    assert left_s([half, half, *waiting]) == pytest.approx((20 + 20 + 2 * 40) / 2)
    assert left_s([Seen("b", "running", 4, tuple(rounds[:1])), *waiting]) is None
    silent = tuple(RoundRecord(i, wall_s=None) for i in range(3))  # a private run on real nodes does not tell
    assert left_s([Seen("b", "running", 4, silent)]) is None


def test_a_record_that_is_no_record_is_said_and_hides_nothing_else(tmp_path: Path) -> None:
    lay_sweep(tmp_path)
    (tmp_path / "b" / "metrics.jsonl").write_text("[]\n")
    (tmp_path / "c" / "config.yaml").write_text("a: [")
    whole = (tmp_path / "a" / "summary.json").read_text()
    for torn in ("[1]", json.dumps({**json.loads(whole), "selected": {"a": 1}})):
        (tmp_path / "a" / "summary.json").write_text(torn)
        assert Watch(tmp_path).look()[0].state == "unreadable"
    (tmp_path / "a" / "summary.json").write_text(whole)
    assert [each.state for each in Watch(tmp_path).look()] == ["finished", "unreadable", "unreadable", "interrupted", "waiting"]
    (tmp_path / "manifest.json").write_text('{"jobs": [')  # as no sweep leaves it, which writes it whole
    with pytest.raises(UserError, match=r"manifest\.json' can't be read"):
        Watch(tmp_path).look()


def test_what_is_taken_away_while_one_looks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job's folder between two looks, or within one; at last all of it."""
    lay_sweep(tmp_path / "sweep")
    watch = Watch(tmp_path / "sweep")
    watch.look()
    shutil.rmtree(tmp_path / "sweep" / "b")
    assert [each.state for each in watch.look()] == ["finished", "running", "failed", "interrupted", "waiting"]
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: is_file(path) or path == tmp_path / "sweep" / "b" / "metrics.jsonl")
    assert [each.state for each in watch.look()][1] == "running"
    shutil.rmtree(tmp_path / "sweep")
    with pytest.raises(UserError, match=r"sweep' is gone$"):
        watch.look()


def test_a_run_is_watched_until_it_is_over(call: Call, tmp_path: Path) -> None:
    run = begin(tmp_path / "run")

    def grow() -> None:
        for record in make_records(rounds=ROUNDS):
            time.sleep(0.4)
            run.append(record)
        finish(run)

    thread = threading.Thread(target=grow)
    thread.start()
    status, out, _ = call("watch", str(tmp_path / "run"), "--every", "0.1", "--html")
    thread.join()
    assert status == 0
    assert [f"{i}/3" in out for i in range(4)] == [True] * 4
    assert out.splitlines()[-1] == "1 finished"
    [part] = data_of(tmp_path / "run" / "report.html")
    assert part["groups"][0]["label"] == "fed_sb"
    assert next(each for each in part["charts"] if each["key"] == "quality")["variants"][0]["rows"][0]["x"] == [0, 1, 2, 3]


def test_one_look_shows_what_is_there(call: Call, tmp_path: Path) -> None:
    lay_sweep(tmp_path / "sweep")
    before = contents(tmp_path)
    status, out, _ = call("watch", str(tmp_path / "sweep"), "--once")
    assert (status, len(out.splitlines())) == (0, 6)
    assert contents(tmp_path) == before
    assert call("watch", str(tmp_path / "sweep"), "--once", "--html")[0] == 0
    assert set(contents(tmp_path)) - set(before) == {"sweep/comparison.html"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "error: fedsb watch needs the folder of one run or sweep"),
        (["a", "b"], "error: fedsb watch needs the folder of one run or sweep"),
        (["nowhere"], "error: 'nowhere' holds neither a run nor a sweep"),
        ([".", "--every", "often"], "error: --every often: give seconds, 0.1 at least"),
        ([".", "--every=0"], "error: --every 0: give seconds, 0.1 at least"),
    ],
)
def test_a_mistake_is_one_line(call: Call, arguments: list[str], said: str) -> None:
    status, out, err = call("watch", *arguments)
    assert (status, out) == (2, "")
    assert first_line(err).startswith(said)
