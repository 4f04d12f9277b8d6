"""What is wrong with a machine is found, each fault by its own check, and told in one line with what mends it."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from fedsb.commands.doctor import CHECKS, examine
from fedsb.commands.doctor_checks import PORT, Machine
from fedsb.federation import link
from tests.commands.calls import Call

FREE: dict[str, str] = {"HF_HUB_OFFLINE": "1"}
Planted = Callable[[Path], Machine]


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield int(other.getsockname()[1])


def lines(out: str) -> dict[str, tuple[str, str]]:
    """Return whether it is well, and what is said, by check."""
    names = max(map(len, CHECKS))
    return {line[6 : 6 + names].strip(): (line[:4].strip(), line[8 + names :]) for line in out.splitlines() if line[:4] in ("ok  ", "FAIL")}


def test_a_sound_machine_is_told_line_by_line_and_has_run_a_federation(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    # Containers that tests run in may be small.
    status = examine(Machine(port=number, least_shared=0, least_memory=0, least_disk=0, cards=(), environment=FREE))
    out, err = capsys.readouterr()
    found = lines(out)
    assert list(found) == list(CHECKS)
    assert {well for well, _ in found.values()} == {"ok"}, out
    assert (status, err, out.splitlines()[-1]) == (0, "", "all is well")
    assert f"torch {version('torch')}" in found["versions"][1]
    assert found["smoke run"][1].startswith("two clients, one round, ")
    assert not list(Path().iterdir())  # nothing is left behind


def test_the_port_that_is_tried_is_the_one_that_a_superlink_takes() -> None:
    assert link.PORT == PORT


FAULTS: dict[str, tuple[str, Planted, str]] = {
    "tiny shared memory": ("shared memory", lambda at: Machine(shared=at, least_shared=2**60), r"free in .*, of at least .*--shm-size"),
    "no shared memory": ("shared memory", lambda at: Machine(shared=at / "none"), r"none is missing; .*runtime=local"),
    "little memory": ("memory", lambda at: Machine(least_memory=2**60), r"left to this process, of at least .*; end other processes"),
    "a full disk": ("disk", lambda at: Machine(least_disk=2**60), r"free at .*, of at least .*; free some"),
    "a file in the way": ("folders", lambda at: Machine(output=made(at / "file") / "runs"), r"file' is a file; say output=FOLDER"),
    "a missing package": ("packages", lambda at: Machine(needs=["absent>=1", "torch"]), r"^absent is missing; pip install 'absent>=1'$"),
    "an untested package": (
        "packages",
        lambda at: Machine(needs=["torch<2,>=1", 'absent; extra == "x"']),
        r"^torch is 2\..*; pip install 'torch<2,>=1'$",
    ),
    "a card that torch does not take": (
        "GPU",
        lambda at: Machine(cards=[str(made(at / "nvidia0"))]),
        r"nvidia0 is there, and torch .*; install its driver",
    ),
    "a word for offline": (
        "offline",
        lambda at: Machine(environment={"HF_HUB_OFFLINE": "offline"}),
        r"HF_HUB_OFFLINE=offline counts as off; set it to 1 or 0",
    ),
    "a word that another takes back": (
        "offline",
        lambda at: Machine(environment={"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}),
        r"127\.0\.0\.1 doesn't answer",
    ),
    "a proxy that does not answer": (
        "offline",
        lambda at: Machine(environment={"HF_ENDPOINT": "https://hub.example", "HTTPS_PROXY": "http://127.0.0.1:9"}),
        r"the proxy 127\.0\.0\.1 doesn't answer .*; set HF_HUB_OFFLINE=1",
    ),
    "a hub that does not answer": (
        "offline",
        lambda at: Machine(environment={"HF_ENDPOINT": "http://127.0.0.1:9"}),
        r"127\.0\.0\.1 doesn't answer .*; set HF_HUB_OFFLINE=1",
    ),
}


def made(path: Path) -> Path:
    path.write_text("")
    return path


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_by_its_check_alone(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check, planted, said = FAULTS[name]
    if "card" in name and torch.cuda.is_available():
        pytest.skip("torch takes the card that is here")
    others = [each for each in CHECKS if each not in ("smoke run", "port")]
    machine = planted(tmp_path)
    if check != "offline":
        machine = Machine(**{**vars(machine), "environment": FREE})
    assert examine(machine, others) == 1
    out, err = capsys.readouterr()
    found = lines(out)
    assert [each for each, (well, _) in found.items() if well == "FAIL"] == [check]
    assert re.search(said, found[check][1]), found[check][1]
    assert err == f"1 of {len(others)} checks failed: {check}\n"


def test_a_taken_port_is_found(taken: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert examine(Machine(port=taken), ["port"]) == 1
    assert lines(capsys.readouterr().out)["port"][1].startswith(
        f"{taken} can't be listened on (address already in use); end what listens there"
    )


def test_a_hub_behind_a_proxy_is_asked_through_it(taken: int, capsys: pytest.CaptureFixture[str]) -> None:
    behind = {"HF_ENDPOINT": "https://hub.example", "https_proxy": f"127.0.0.1:{taken}"}
    assert examine(Machine(environment=behind), ["offline"]) == 0
    assert lines(capsys.readouterr().out)["offline"][1].startswith("the proxy 127.0.0.1 answers")
    apart = {**behind, "HF_ENDPOINT": f"http://127.0.0.1:{taken}", "http_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}
    assert examine(Machine(environment=apart), ["offline"]) == 0


def test_each_folder_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FEDSB_HOME", "/proc/here")
    assert examine(Machine(output=Path("/proc/runs")), ["folders"]) == 1
    said = lines(capsys.readouterr().out)["folders"][1]
    assert "set FEDSB_HOME to a folder of yours. output: " in said
    assert said.endswith("; say output=FOLDER")


def test_a_folder_that_cannot_be_written_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert examine(Machine(output=Path("/proc/runs")), ["folders"]) == 1
    assert lines(capsys.readouterr().out)["folders"][1].endswith("; say output=FOLDER")
    monkeypatch.setenv("FEDSB_HOME", "/proc/here")
    assert examine(Machine(), ["folders"]) == 1
    assert lines(capsys.readouterr().out)["folders"][1].endswith("; set FEDSB_HOME to a folder of yours")


def test_what_the_installed_package_asks_for_is_what_is_held(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = tmp_path / "fedsb-0.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: fedsb\nVersion: 0.0\nRequires-Dist: no-such-package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert examine(Machine(), ["packages"]) == 1
    assert "no-such-package is missing" in capsys.readouterr().out


def test_a_run_that_cannot_run_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert examine(Machine(), ["smoke run"]) == 1
    assert lines(capsys.readouterr().out)["smoke run"][1].endswith("; mend that first")
    assert "FEDSB_HOME" in os.environ


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["here"], "fedsb doctor takes no 'here'"),
        (["--port", "http"], "--port http is no port"),
        (["--port=70000"], "--port 70000 is no port"),
    ],
)
def test_a_mistake_is_one_line(given: list[str], said: str, call: Call) -> None:
    status, out, err = call("doctor", *given)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {said}")
