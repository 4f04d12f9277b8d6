"""What is offered at a tab is what the command line takes, and it is there before anybody has waited."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedsb.cli import COMMANDS
from fedsb.commands.completing import AFTER, candidates
from fedsb.commands.completion import SCRIPTS
from fedsb.commands.federation import WHAT
from fedsb.commands.flags import FLAGS, names_of
from fedsb.config.explaining import groups, known_keys
from fedsb.config.overrides import OPEN
from tests.commands.calls import Call, first_line

ROOT = Path(__file__).resolve().parents[2]


def leaves(word: str = "", command: str = "run") -> set[str]:
    """Return all that is offered, followed to its end."""
    found: set[str] = set()
    for each in candidates([command, word]):
        found |= leaves(each, command) if each.endswith(".") and each != word else {each}
    return found


def test_every_command_is_offered_and_completed() -> None:
    assert set(AFTER) == set(COMMANDS)
    assert set(candidates([""])) == {*COMMANDS, "-h", "--help", "--version"}
    assert set(candidates([])) == set(candidates([""]))


@pytest.mark.parametrize("table", sorted(FLAGS))
def test_the_flags_of_a_command_are_offered(table: str) -> None:
    assert set(candidates([*table.split(), "-"])) == {*names_of(table), "-h", "--help"}


def test_keys_and_groups_are_those_of_the_configuration() -> None:
    """A key that is a table of its own goes on behind a dot; what methods and models name there is no key that all have."""
    offered = leaves()
    keys = {each.removesuffix("=") for each in offered} - {*groups()}
    assert {each for each in offered if not each.endswith("=")} == set()
    assert set(known_keys()) <= keys
    assert all(key.startswith((*OPEN, "model.config.")) for key in keys - set(known_keys()))
    assert {f"{group}=" for group in groups()} <= set(candidates(["run", ""]))


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        (["run", "runtime="], ["runtime=local", "runtime=ray"]),
        (["run", "-m", "runtime=local,r"], ["runtime=local,ray"]),
        (["run", "+privacy=e"], ["+privacy=example"]),
        (["run", "federation.part"], ["federation.partition."]),
        (["run", "plots="], ["plots=false", "plots=true"]),
        (["run", "--cfg", ""], ["all", "hydra", "job"]),
        (["run", "--info", "config"], ["config"]),
        (["run", "--cfg=j"], ["--cfg=job"]),
        (["run", "--help", "runtime=r"], ["runtime=ray"]),
        (["run", "train.lr="], []),
        (["run", "nonsense="], []),
        (["export", "somewhere", "--format", "p"], ["peft"]),
        (["export", "somewhere", "--format=p"], ["--format=peft"]),
        (["export", "--foo="], []),
        (["eval", "somewhere", "eval.scorer"], ["eval.scorer="]),
        (["federation", "sto"], ["stop"]),
        (["federation", "stop", ""], []),
        (["federation", "node", "x", "--worker-u"], ["--worker-user"]),
        (["node", ""], ["check"]),
        (["node", "check", ""], []),
        (["node", "check", "file", "runtime=r"], ["runtime=ray"]),
        (["completion", ""], ["bash", "fish", "zsh"]),
        (["nonsense", ""], []),
    ],
)
def test_what_is_offered(line: list[str], offered: list[str]) -> None:
    assert candidates(line) == offered


def test_the_sides_of_a_federation_are_offered() -> None:
    assert set(candidates(["federation", ""])) == set(WHAT)


def laid(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def test_folders_of_runs_are_offered_and_to_go_on_those_that_were_cut_off(tmp_path: Path) -> None:
    laid(tmp_path / "outputs" / "day" / "done", "metrics.jsonl", "summary.json")
    laid(tmp_path / "outputs" / "day" / "cut", "metrics.jsonl")
    laid(tmp_path / "outputs" / "day" / "with a space", "metrics.jsonl")
    laid(tmp_path / "outputs" / "day" / "empty")
    laid(tmp_path / "multirun" / "day" / "sweep", "jobs.jsonl")
    laid(tmp_path / "multirun" / "day" / "sweep" / "0", "metrics.jsonl", "summary.json")
    laid(tmp_path / "named", "metrics.jsonl", "summary.json")
    laid(tmp_path / "conf", "config.yaml")
    laid(tmp_path / "home" / "runs" / "7302", "metrics.jsonl")
    flower = f"{tmp_path}/home/runs/7302"
    sweep = ["multirun/day/sweep", "multirun/day/sweep/0"]
    for command in ("report", "watch", "eval", "export"):
        assert candidates([command, ""]) == sorted([flower, *sweep, "named", "outputs/day/cut", "outputs/day/done"])
    assert candidates(["run", "resume="]) == sorted([f"resume={flower}", "resume=multirun/day/sweep", "resume=outputs/day/cut"])


def test_federations_of_flower_are_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    assert candidates(["submit", "ward"]) == []
    (tmp_path / "config.toml").write_text('[superlink]\ndefault = "ward"\n[superlink.ward]\naddress = "127.0.0.1:1"\n')
    assert candidates(["submit", "ward"]) == ["ward"]
    assert candidates(["submit", "ward", "runtime=l"]) == ["runtime=local"]
    (tmp_path / "config.toml").write_text("[[[")
    assert candidates(["submit", "runtime=l"]) == ["runtime=local"]


@pytest.mark.parametrize(
    ("given", "said"), [([], "takes one shell"), (["bash", "zsh"], "takes one shell"), (["bsh"], "unknown shell 'bsh' (did")]
)
def test_a_shell_that_nobody_has_is_one_line(call: Call, given: list[str], said: str) -> None:
    status, out, err = call("completion", *given)
    assert (status, out) == (2, "")
    assert said in first_line(err)


def in_shell(folder: Path, shell: str, *command: str) -> list[str]:
    """Run a shell that finds ``fedsb`` on its path, and return the lines that it prints."""
    program = folder / "bin" / "fedsb"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -P -m fedsb.cli "$@"\n')
    program.chmod(0o755)
    environment = {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}", "HOME": str(folder)}
    done = subprocess.run([shell, *command], cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout.splitlines()


LINES = {
    "fedsb run federation.part": ["federation.partition."],
    "fedsb run runtime=": ["runtime=local", "runtime=ray"],
    "fedsb run -m runtime=local,r": ["runtime=local,ray"],
    "fedsb export --format ": ["gguf-ready", "merged", "peft"],
    "fedsb federation sto": ["stop"],
}


@pytest.mark.slow
def test_bash_gets_them_as_it_takes_them(tmp_path: Path) -> None:
    """Of a word with ``=`` it asks for what stands behind."""
    ask = 'COMP_LINE=$1 COMP_POINT=${#1}; _fedsb fedsb; printf "%s\\n" "${COMPREPLY[@]}"'
    for line, offered in LINES.items():
        found = in_shell(tmp_path, "bash", "-c", f"source <(fedsb completion bash); {ask}", "-", line)
        assert found == [each.rpartition("=")[2] for each in offered]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
def test_fish_gets_them(tmp_path: Path) -> None:
    for line, offered in LINES.items():
        assert sorted(in_shell(tmp_path, "fish", "-c", f"fedsb completion fish | source; complete -C '{line}'")) == offered


@pytest.mark.slow
@pytest.mark.parametrize("shell", sorted(SCRIPTS))
def test_a_shell_can_read_its_script(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    path = tmp_path / "script"
    path.write_text(SCRIPTS[shell], encoding="utf-8")
    subprocess.run([shell, "-n", str(path)], check=True)


@pytest.mark.slow
def test_nobody_waits_at_a_tab() -> None:
    """No import that takes long: with torch alone it would be seconds."""
    code = (
        "import sys; from fedsb.cli import main; sys.argv = ['fedsb', '__complete', 'run', 'runtime=']\ntry: main()\n"
        "except SystemExit: print(sorted({'torch', 'hydra', 'omegaconf', 'pydantic', 'ray', 'flwr', 'numpy', 'rich'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["runtime=local", "runtime=ray", "[]"]
