"""``fedsb submit``: what it refuses before anything is sent, and what it says of an ending."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsb.cli import main
from fedsb.commands.submit import ending
from fedsb.config.compose import load
from fedsb.runtime.connection import RunStatus, own_lines
from fedsb.runtime.flower import free_port

TWO = '[superlink]\n{default}\n[superlink.hospitals]\naddress = "{address}"\ninsecure = true\n[superlink.banks]\naddress = "b:1"\n'
DEFAULT = 'default = "hospitals"'


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Flower's home, without a configuration, and a folder to stand in."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flwr").mkdir()
    return tmp_path / "flwr"


def configure(home: Path, text: str = TWO, default: str = DEFAULT, address: str = "a:1") -> None:
    (home / "config.toml").write_text(text.format(default=default, address=address), encoding="utf-8")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line that a command is refused with."""
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["submit", *arguments])
    out, err = capsys.readouterr()
    [line] = err.splitlines()
    assert not out
    return line.removeprefix("error: ")


def test_an_unknown_federation_is_answered_by_the_names_there_are(home: Path, capsys) -> None:
    configure(home)
    said = refused(capsys, "hospital", "rank=4")
    assert said == f"unknown federation 'hospital' (did you mean 'hospitals'?); '{home}/config.toml' has banks, hospitals"


def test_a_default_is_taken_or_asked_for(home: Path, capsys) -> None:
    configure(home, default="")
    assert refused(capsys, "rank=4") == f"no federation is given, and '{home}/config.toml' has no default; choose from banks, hospitals"
    configure(home, default='default = "lost"')
    assert refused(capsys).startswith("unknown federation 'lost'")


def test_where_there_is_no_federation_it_says_how_to_write_one(home: Path, capsys) -> None:
    assert "is not there; write into it: [superlink.my-federation] with address" in refused(capsys, "mine")
    configure(home, "[superlink]\n")
    assert "names no federation; write into it: [superlink.my-federation]" in refused(capsys, "mine")
    configure(home, "[superlink\n")
    assert f"'{home}/config.toml', where Flower keeps its federations, can't be read: " in refused(capsys, "mine")


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("rnak=4", "unknown key 'rnak' (did you mean 'rank'?)"),
        ("method=fedex", "unknown method 'fedex' (did you mean 'fedex_lora'?)"),
        ("privacy.epsilon=0", "privacy.epsilon=0"),
        ("seed=1,2", "'seed=1,2' names several values"),
        ("banks", "cannot read 'banks': an override is KEY=VALUE"),
        ("-m", "fedsb submit takes no flag '-m'"),
        ("--stream", "fedsb submit takes no flag '--stream'"),
    ],
)
def test_what_cannot_be_composed_is_refused_before_anything_is_sent(home: Path, capsys, argument: str, said: str) -> None:
    """No SuperLink is looked for, nor the federation's name: there is none."""
    assert refused(capsys, "nowhere", argument).startswith(said)


@pytest.mark.slow
def test_a_superlink_that_is_not_there_is_a_mistake(home: Path, capsys) -> None:
    address = f"127.0.0.1:{free_port()}"
    configure(home, address=address)
    said = refused(capsys, "hospitals", "rank=4")
    assert said.startswith(f"hospitals ({address}) takes no run: ")
    assert "Connection to the SuperLink is unavailable" in said
    assert "Using SuperLink" not in said


def test_an_ending_is_one_line_that_says_how_to_go_on_where_that_is_possible() -> None:
    killed = RunStatus("failed", "No heartbeat received from the task")
    default, elsewhere, again = load([]), load(["output=there"]), load(["resume=here"])
    assert ending(7, killed, default).startswith("run 7 failed: its ServerApp was killed, or its machine went down (No heartbeat received")
    assert ending(7, killed, default).endswith("go on with resume=<FEDSB_HOME of the SuperLink>/runs/7")
    assert ending(7, killed, elsewhere).endswith("go on with resume=there")
    assert ending(7, killed, again).endswith("go on with resume=here")
    assert ending(7, RunStatus("failed", "a\n b"), default) == "run 7 failed: a b"
    assert ending(7, RunStatus("stopped", ""), default) == "run 7 was stopped"


def test_of_a_log_what_flower_says_of_itself_is_left_out() -> None:
    log = [
        "Using SuperLink: a (b:1)\n",
        "\U0001f50d Displaying information for run ID 7...\n",
        "\x1b[92mINFO\x1b[0m :      Starting\n",
        "round 1/3  loss 0.971\n",
        "WARNING :   a b\n",
        "error: rank=0\n",
        "\x1b[91mERROR\x1b[0m :  no\n",
    ]
    assert list(own_lines(log)) == ["round 1/3  loss 0.971", "error: rank=0", "ERROR :  no"]
