"""A run that is ended at any moment and taken up again ends with the bits, the bytes and the account of one that was left alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import join
from socket import gethostname
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from opacus.accountants import PRVAccountant
from safetensors import safe_open
from safetensors.torch import save_file

from fedsb import client_app
from fedsb.app import outcome
from fedsb.cli import main
from fedsb.client_stack import answer_together
from fedsb.config.compose import load
from fedsb.core.errors import RunError, UserError
from fedsb.core.rng import numpy_generator
from fedsb.privacy.codes import CODES
from fedsb.privacy.randomness import simulated_streams
from fedsb.report.report import write_report
from fedsb.run.folder import RunFolder, read_run
from fedsb.run.records import RoundRecord
from fedsb.run.resuming import for_nodes, resumed, sealed
from fedsb.runtime.local import LocalGrid
from fedsb.runtime.stack_size import stack_size
from fedsb.server_app import serve
from strategies import STRATEGIES
from tests.strategies.federations import named
from tests.strategies.private_runs import CLIENT, EXAMPLE, small, write_table

RUNS = {
    "fed_sb": ("init.kind=gradient", "init.num_examples=8", "init.power_iterations=0"),
    "fedex_lora": ("method=fedex_lora", "federation.fraction=0.75"),
    "adam": ("method=fedavg_lora", "federation.server_optimizer.name=adam", "federation.server_optimizer.lr=0.1"),
    "momentum": ("init.kind=random", "federation.server_optimizer.name=momentum", "federation.wire_dtype=bfloat16"),
    "fedau": ("method=fedavg_lora", "federation.weighting=fedau", "federation.fraction=0.5", "federation.cutoff=2"),
    "private examples": (*EXAMPLE, "privacy.clipping=adaptive", "init.kind=weight_svd"),
    "private clients": (*CLIENT, "privacy.clipping=adaptive", "privacy.quantile_lr=0.5", "init.kind=weight_svd"),
}
RUNS |= {method: (f"method={method}",) for method in STRATEGIES if method not in RUNS}
RUNS["two ranks"] = ("method=flexlora", "federation.ranks=[1,2]")
PRIVATE_START = ("init.kind=gradient", "init.num_examples=8", "init.power_iterations=0", "privacy.init_fraction=0.3")
Run = Callable[..., dict[str, Any]]


class Killed(BaseException):
    """Ends a process at once, as far as a process can do that to itself."""


class Mortal(LocalGrid):
    """Ends the run when it has pulled so many replies, the last one after or before it was computed."""

    life, after = 10**9, False

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.life -= 1
        if self.life < 0 and not self.after:
            raise Killed
        replies = super().pull_messages(message_ids)
        if self.life < 0:
            raise Killed
        return replies


@pytest.fixture
def run(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a small federation of three rounds in a folder; it dies after ``life`` replies."""
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))

    def go(folder: Path, *more: str, life: int = 10**9, after: bool = False) -> dict[str, Any]:
        resuming = any(override.startswith("resume=") for override in more)
        overrides = list(more) if resuming else small(tiny_bert, tmp_path, "federation.num_rounds=3", *more)
        config = resumed(load(overrides), overrides)
        stack = {"stack": stack_size(config), "together": answer_together}
        grid = Mortal.simulation(client_app.app, {"overrides": join(overrides), "output": str(folder)}, **stack)
        grid.life, grid.after = life, after
        return serve(config, grid, folder)

    return go


def told(folder: Path) -> list[RoundRecord]:
    """Return a run's records without its times."""
    return [replace(record, wall_s=0.0, cpu_s=0.0) for record in read_run(folder).records]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_at_any_reply_ends_like_one_that_was_not(name: str, run: Run, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", *RUNS[name])
    draw, folder = numpy_generator(0, "kill", name), tmp_path / "killed"
    with pytest.raises(Killed):
        run(folder, *RUNS[name], life=int(draw.integers(2, 14)), after=bool(draw.integers(2)))
    with pytest.raises(Killed):
        run(folder, f"resume={folder}", life=int(draw.integers(2)), after=bool(draw.integers(2)))
    again = run(folder, f"resume={folder}")
    assert again["factors_sha256"] == whole["factors_sha256"]
    assert told(folder) == told(tmp_path / "whole")
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4
    differ = {key for key in whole if again[key] != whole[key]}
    assert differ <= {"wall_s", "cpu_s"}


@pytest.mark.parametrize("method", ["fed_sb", "fedavg_lora"])
def test_a_language_model_in_bfloat16_is_taken_up_with_the_same_bits_and_the_bytes_of_float32(
    method: str, run: Run, tiny_llama: Path, tmp_path: Path
) -> None:
    start = RUNS["fed_sb"] if method == "fed_sb" else ()
    language = (f"method={method}", f"model.name='{tiny_llama}'", "data.task=causal_lm", "data.label=null", *start)
    narrow = (*language, "model.dtype=bfloat16")
    whole, wide = run(tmp_path / "whole", *narrow), run(tmp_path / "wide", *language)
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        run(folder, *narrow, life=9)
    again = run(folder, f"resume={folder}")
    assert {key for key in whole if again[key] != whole[key]} <= {"wall_s", "cpu_s"}
    assert whole["factors_sha256"] != wide["factors_sha256"]
    assert all(whole[key] == wide[key] for key in ("payload_up", "payload_down", "payload_one_off"))


def test_epsilon_is_that_of_the_ledgers_with_empty_samples_and_absent_rounds(run: Run, tmp_path: Path) -> None:
    """Killed twice, half of the clients a round, one example a sample on average: Opacus alone, from the files, says the same."""
    more = ("privacy=example", "privacy.epsilon=8", "privacy.accountant=prv", "init.kind=weight_svd")
    sparse = (*more, "federation.fraction=0.5", "train.batch_size=1")
    folder = tmp_path / "run"
    for given, life in (((*sparse,), 4), ((f"resume={folder}",), 1)):
        with pytest.raises(Killed):
            run(folder, *given, life=life, after=True)
    summary = run(folder, f"resume={folder}")
    found, empty = {}, 0
    for path in (folder / "ledgers").glob("*/ledger.jsonl"):
        header, *charges = [json.loads(line) for line in path.read_text().splitlines()]
        accountant = PRVAccountant()
        for charge in charges:
            [entry] = charge["entries"]
            accountant.history += [(entry["noise_multiplier"], entry["sampling_rate"], entry["steps"])]
            draws = simulated_streams(0, header["client"], charge["key"][1], "train", torch.device("cpu")).sampling
            empty += sum(not bool((torch.rand(20, generator=draws) < entry["sampling_rate"]).any()) for _ in range(entry["steps"]))
        found[header["client"]] = accountant.get_epsilon(delta=1e-5)
        assert len(charges) == sum(header["client"] in record.clients for record in read_run(folder).records[1:])
    assert empty > 0
    assert len(set(map(len, [[r for r in read_run(folder).records[1:] if c in r.clients] for c in found]))) > 1
    assert summary["epsilon"]["max"] == pytest.approx(max(found.values()), rel=0.01)
    assert 0.95 * 8 <= summary["epsilon"]["max"] <= 8


def test_a_stack_goes_on_as_a_stack(run: Run, tmp_path: Path) -> None:
    """Side by side other bits come out than one after the other: a resumed run must not change over."""
    more = ("method=fedavg_lora", "adapter.dropout=0.1", "runtime.stack=3")
    whole, folder = run(tmp_path / "whole", *more), tmp_path / "killed"
    alone = run(tmp_path / "alone", *more[:-1])
    assert whole["factors_sha256"] != alone["factors_sha256"]
    with pytest.raises(Killed):
        run(folder, *more, life=3)
    assert run(folder, f"resume={folder}")["factors_sha256"] == whole["factors_sha256"]


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ((), {"kind": "ray", "workers": 3, "client_timeout": 9.0}),
        (("runtime=ray",), {"kind": "ray", "workers": 3}),
        (("runtime=local",), {"kind": "local", "workers": None, "client_timeout": None}),
        (("runtime.workers=1", "progress=json"), {"kind": "ray", "workers": 1, "client_timeout": 9.0}),
        (("runtime=local", "runtime.threads=2"), {"kind": "local"}),
    ],
    ids=" ".join,
)
def test_a_run_goes_on_where_it_ran_unless_told_otherwise(
    more: Sequence[str], wanted: dict[str, Any], tiny_bert: Path, tmp_path: Path
) -> None:
    given = ("runtime=ray", "runtime.workers=3", "runtime.client_timeout=9", "runtime.stack=4", "runtime.threads=2", "keep_checkpoints=7")
    RunFolder(tmp_path / "run").write_config(sealed(load(small(tiny_bert, tmp_path, *given))))
    overrides = [f"resume={tmp_path / 'run'}", *more]
    config = resumed(load(overrides), overrides)
    assert {key: getattr(config.runtime, key) for key in wanted} == wanted
    assert (config.runtime.stack, config.runtime.threads, config.keep_checkpoints) == (4, 2, 7)
    assert config.progress == ("json" if "progress=json" in more else "auto")


@pytest.fixture
def stopped(run: Run, tmp_path: Path) -> Path:
    """A run of three rounds that was killed in its third."""
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        run(folder, "init.kind=weight_svd", life=10)
    assert [path.name for path in sorted((folder / "checkpoints").glob("round-*"))] == ["round-0001.safetensors", "round-0002.safetensors"]
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def rewrite(path: Path, **facts: Any) -> None:
    """Change a checkpoint's facts as another program would, its hash included."""
    from fedsb.run.groups import digest_of

    with safe_open(path, "pt") as file:
        text = json.dumps({**json.loads(file.metadata()["facts"]), **facts})
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"facts": text, "sha256": digest_of(tensors, text)})


HARMS: dict[str, Callable[[Path], object]] = {
    "bit flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "empty": lambda path: path.write_bytes(b""),
    "of another run": lambda path: rewrite(path, run="0" * 16),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    harm: str, stopped: Path, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(tmp_path / "whole", "init.kind=weight_svd")
    HARMS[harm](stopped / "checkpoints" / "round-0002.safetensors")
    assert run(stopped, f"resume={stopped}")["factors_sha256"] == whole["factors_sha256"]
    assert "checkpoint passed over" in caplog.text
    assert "round-0002.safetensors" in caplog.text


def test_a_run_whose_checkpoints_are_all_damaged_does_not_go_on(stopped: Path, run: Run) -> None:
    before = (stopped / "metrics.jsonl").read_text()
    flip(next((stopped / "checkpoints").glob("frozen-*")))
    with pytest.raises(RunError, match=r"no checkpoint can be used: .*round-0002.* hash differs.*round-0001"):
        run(stopped, f"resume={stopped}")
    assert (stopped / "metrics.jsonl").read_text() == before


def test_a_run_without_a_checkpoint_says_that_it_begins_anew(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "run", *RUNS["fed_sb"], life=3)
    run(tmp_path / "run", f"resume={tmp_path / 'run'}")
    assert "no checkpoint is there yet: the run begins anew" in capsys.readouterr().out


def test_a_checkpoint_of_a_later_version_is_refused(stopped: Path, run: Run) -> None:
    rewrite(stopped / "checkpoints" / "round-0002.safetensors", format=99)
    with pytest.raises(UserError, match=r"written by a later version \(format 99, this one reads 2\); use that version$"):
        run(stopped, f"resume={stopped}")


MISTAKES = {
    "rank": (("rank=4", "seed=3"), r"resume=.*: rank=4 \(that run: 2\), seed=3 \(that run: 0\); leave out what differs"),
    "method": (("method=fedavg_lora",), r"method.adapter=lora \(that run: lora_sb\)"),
    "stack": (("runtime=ray", "runtime.stack=2"), r"^resume=.*: runtime.stack=2 \(that run: 1\); leave out what differs"),
    "output": (("output=elsewhere",), r"^output=elsewhere with resume=.*: a run goes on in its own folder; leave output out$"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_that_run_was_not_is_named(name: str, stopped: Path, run: Run) -> None:
    overrides, message = MISTAKES[name]
    with pytest.raises(UserError, match=message):
        run(stopped, f"resume={stopped}", *overrides)


def test_a_configuration_that_was_changed_since_is_refused(stopped: Path, run: Run) -> None:
    text, before = (stopped / "config.yaml").read_text(), (stopped / "metrics.jsonl").read_text()
    for changed in (text.replace("seed: 0", "seed: 1"), "\n".join(text.splitlines()[1:])):
        assert changed != text
        (stopped / "config.yaml").write_text(changed)
        with pytest.raises(UserError, match=r"config.yaml' was changed since the run began, .*; undo the change, or begin another run$"):
            run(stopped, f"resume={stopped}")
        with pytest.raises(SystemExit, match="2"):
            main(["run", f"resume={stopped}"])
        assert (stopped / "metrics.jsonl").read_text() == before
    (stopped / "config.yaml").write_text(text)
    run(stopped, f"resume={stopped}")


HEADERS: dict[str, dict[str, Any] | None] = {
    "another run": {"run": "0123456789abcdef"},
    "another privacy": {"privacy": {}},
    "no header": None,
}
EARLY, LATE = 3, 12  # before the first checkpoint, and after it


# All pairs of a unit, a header and a time.
@pytest.mark.parametrize(
    ("kind", "header", "life"),
    [
        ("private examples", "another run", EARLY),
        ("private examples", "another privacy", LATE),
        ("private examples", "no header", EARLY),
        ("private clients", "another run", LATE),
        ("private clients", "another privacy", EARLY),
        ("private clients", "no header", LATE),
    ],
)
def test_a_ledger_of_another_configuration_is_refused_before_anyone_is_asked(
    kind: str, header: str, life: int, run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        run(folder, *RUNS[kind], *PRIVATE_START, life=life)
    ledger = next(folder.glob("ledgers/*/ledger.jsonl"))
    first, *rest = ledger.read_text().splitlines(keepends=True)
    other = HEADERS[header]
    foreign = "[]" if other is None else json.dumps({**json.loads(first), **other})
    ledger.write_text("".join([f"{foreign}\n", *rest]))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ledger.name}
    with pytest.raises(UserError, match=r"ledger.jsonl' was kept for another configuration|line 1 is no header of a privacy ledger"):
        run(folder, f"resume={folder}")
    assert all(path.read_bytes() == content for path, content in before.items())
    ledger.write_text("".join([first, *rest]))
    assert run(folder, f"resume={folder}")["epsilon"]["max"] > 0


def test_a_folder_that_was_renamed_is_not_charged_again_for_the_same_noise(run: Run, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", *RUNS["private clients"])
    with pytest.raises(Killed):
        run(tmp_path / "killed", *RUNS["private clients"], life=10)
    folder = (tmp_path / "killed").rename(tmp_path / "renamed")
    again = run(folder, f"resume={folder}")
    assert again["factors_sha256"] == whole["factors_sha256"]
    assert again["epsilon"] == whole["epsilon"]
    ledgers = [(tmp_path / name / "ledgers" / "server" / "ledger.jsonl").read_text() for name in ("renamed", "whole")]
    assert ledgers[0] == ledgers[1]


def test_the_same_overrides_beside_resume_are_welcome(stopped: Path, tiny_bert: Path, tmp_path: Path) -> None:
    given = [*small(tiny_bert, tmp_path, "init.kind=weight_svd", "federation.num_rounds=3"), f"resume={stopped}"]
    config = resumed(load(given), given)
    assert config.federation.num_rounds == 3
    # What is sent to nodes is the run's own overrides, or as many beside; never what would leave a default in their place.
    assert for_nodes(config, given, load) == [each for each in given[:-1] if not each.startswith(("federation.wait=", "plots="))]
    assert for_nodes(config, [f"resume={stopped}"], load) is None


def test_how_long_and_for_how_many_to_wait_may_change(stopped: Path) -> None:
    given = [f"resume={stopped}", "federation.min_replies=2", "federation.wait=7", "federation.replace_nodes=true"]
    federation = resumed(load(given), given).federation
    assert (federation.min_replies, federation.wait, federation.replace_nodes, federation.num_rounds) == (2, 7.0, True, 3)


def on_nodes(folder: Path, tiny_bert: Path, tmp_path: Path, *given: str, life: int = 10**9, own: bool = True) -> dict[str, Any]:
    """Run on two real nodes, which a resumed run finds no folder on."""
    nodes = {}
    for number, client in enumerate(("client-0", "client-1"), start=1):
        if not (path := tmp_path / f"{client}.csv").exists():
            write_table(path, 20)
        nodes[number] = named(client, **{"data-path": str(path)})
    overrides = list(given) or small(tiny_bert, tmp_path, *ON_NODES)
    config = resumed(load(overrides), overrides)
    seen = [override if not override.startswith("resume=") else f"resume={tmp_path / 'nowhere'}" for override in overrides]
    grid = Mortal(client_app.app, {"overrides": join(seen)}, nodes)
    grid.life = life
    return serve(config, grid, folder, overrides=overrides if own else None)


ON_NODES = ("method=fedex_lora", "federation.num_clients=2", "federation.num_rounds=3", "train.lr=0.01")


def test_real_nodes_go_on_with_what_the_run_was_begun_with(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    whole = on_nodes(tmp_path / "whole", tiny_bert, tmp_path)
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        on_nodes(folder, tiny_bert, tmp_path, life=6)
    again = on_nodes(folder, tiny_bert, tmp_path, f"resume={folder}")
    assert again["factors_sha256"] == whole["factors_sha256"]
    assert again["failures"] == 0


def test_real_nodes_are_refused_where_nobody_knows_their_configuration(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        on_nodes(folder, tiny_bert, tmp_path, life=6, own=False)
    with pytest.raises(UserError, match=r"^resume on real nodes, which don't see the run's folder: .*give its own overrides too$"):
        on_nodes(folder, tiny_bert, tmp_path, f"resume={folder}")
    assert on_nodes(folder, tiny_bert, tmp_path, *small(tiny_bert, tmp_path, *ON_NODES), f"resume={folder}")["failures"] == 0


@pytest.mark.parametrize("given", [("resume=gone",), (*EXAMPLE, "resume=gone")], ids=["plain", "private"])
def test_a_machine_without_the_folder_trains_with_no_other_configuration(given: tuple[str, ...], tiny_bert: Path, tmp_path: Path) -> None:
    overrides = join(small(tiny_bert, tmp_path, *given))
    nodes: dict[int, dict[str, Any]] = {1: {"partition-id": 0, "num-partitions": 1}, 2: {"client": "client-1", "data-path": str(tmp_path)}}
    asked = RecordDict({"config": ConfigRecord({"clients": '["client-0"]', "labels": '["film", "sport", "trade"]'})})
    grid = LocalGrid(client_app.app, {"overrides": overrides}, nodes)
    simulated, real = grid.send_and_receive([Message(asked, node, "query.describe") for node in nodes])
    assert re.search(
        rf"UserError: resume=.*gone: that folder is not there on {re.escape(gethostname())}; share it", str(simulated.error.reason)
    )
    assert real.content.metric_records["metrics"]["code"] == CODES["refused"].number


def test_a_run_that_dies_at_its_report_goes_on_to_it(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a summary has finished: nobody would write its report any more."""

    def die(*_: object, **__: object) -> None:
        raise Killed

    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(outcome, "write_report", die)
        with pytest.raises(Killed):
            run(folder, "init.kind=weight_svd", "plots=true")
    run(folder, f"resume={folder}")
    written = (folder / "report.md").read_text()
    assert "did not finish" not in written
    assert write_report(folder).read_text() == written


def test_no_run_and_a_finished_run_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^resume=.*: there is no run \(config.yaml is missing\)"):
        run(tmp_path / "none", f"resume={tmp_path / 'none'}")
    assert not (tmp_path / "none").exists()
    run(tmp_path / "done", "init.kind=weight_svd")
    with pytest.raises(UserError, match=r"^resume=.*: that run has finished; begin another"):
        run(tmp_path / "done", f"resume={tmp_path / 'done'}")


def test_a_run_that_is_under_way_is_left_alone(stopped: Path, run: Run) -> None:
    with RunFolder(stopped, resumed=True).held(), pytest.raises(UserError, match=r"is under way in another process; end that one first$"):
        run(stopped, f"resume={stopped}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigkill_at_two_moments(tiny_bert: Path, tmp_path: Path, run: Run) -> None:
    """The real thing, by the command line: killed, resumed, killed, resumed."""
    more = ("init.kind=weight_svd", "federation.num_rounds=30")  # more than are over in the time that two passes are left
    whole, folder = run(tmp_path / "whole", *more), tmp_path / "run"
    overrides = small(tiny_bert, tmp_path, *more, "progress=lines")
    environment = {**os.environ, "FEDSB_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "fedsb.cli", "run"]
    draw = numpy_generator(0, "sigkill")
    for given in ([*overrides, f"output={folder}"], [f"resume={folder}"]):
        lines = len((folder / "metrics.jsonl").read_text().splitlines()) if folder.exists() else 0
        with subprocess.Popen([*command, *given], env=environment, stdout=subprocess.PIPE, text=True) as process:
            # Somewhere between two rounds' lines: what is heard then is not known, which is the point.
            assert process.stdout is not None
            next(line for line in process.stdout if re.match(rf"round +{lines}/|resumed", line))
            time.sleep(float(draw.random()) * 0.3)
            process.send_signal(signal.SIGKILL)
    assert not (folder / "summary.json").exists()
    run(folder, f"resume={folder}")
    assert json.loads((folder / "summary.json").read_text())["factors_sha256"] == whole["factors_sha256"]
