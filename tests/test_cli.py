"""The command line: exit status 0, 1 or 2, and one line for what went wrong."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedsb import cli
from fedsb.cli import main
from fedsb.commands.flags import flags_in, overrides_in
from fedsb.config.overrides import sweep_jobs
from fedsb.core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand in an empty folder, and give back the loggers and filters that a command takes over."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    root, handlers = logging.getLogger(), list(logging.getLogger().handlers)
    with warnings.catch_warnings():
        yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    for handler in handlers:
        if handler not in root.handlers:
            root.addHandler(handler)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in this process; return its exit status and what it printed."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main(arguments)
        out, err = capsys.readouterr()
        return int(done.value.code or 0), out, err

    return run


@pytest.fixture
def quick(tiny_bert: Path, tiny_csv: Path) -> list[str]:
    """A federation of two rounds on a tiny model."""
    return [
        "model=pretrained", f"model.name='{tiny_bert}'", "data=files", f"data.path='{tiny_csv}'", "device=cpu", "rank=2",
        "federation.num_clients=3", "federation.num_rounds=2", "federation.partition.kind=iid", "train.local_steps=1",
        "train.max_length=16", "plots=false",
    ]  # fmt: skip


def first_line(text: str) -> str:
    """Return the only line of an error message."""
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) == 1, text
    return lines[0]


def table(path: Path, *rows: str) -> str:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return f"data.path='{path}'"


MISTAKES = {
    "a method": (["method=fedex"], "error: unknown method 'fedex' (did you mean 'fedex_lora'?)"),
    "a key": (["federation.num_round=3"], "error: unknown key 'federation.num_round' (did you mean 'federation.num_rounds'?)"),
    "a value": (["train.optimizer=adam"], "error: unknown train.optimizer 'adam' (did you mean 'adamw'?)"),
    "a sign of clients": (["init.update=sign"], "error: init.update=sign with init.evidence=clients"),
    "a column": (["data.text=txt"], "error: data.text=txt: the training part has no such column (did you mean 'text'?)"),
    "a rank": (["rank=33"], "error: rank (33) exceeds min(out, in) = 32 of 'bert.encoder.layer.0.attention"),
    "no rank": (["adapter.rank=0"], "error: adapter.rank=0 is out of range; it must be at least 1"),
    "no targets": (["adapter.targets=[]"], "error: adapter.targets=[] adapts nothing"),
    "a device": (["device=cpu:abc"], "error: unknown device 'cpu:abc'"),
    "a key taken away": (["~seed"], "error: seed must be given: add seed=…"),
    "targets": (["adapter.targets=q_proj"], "error: adapter.targets 'q_proj' matches no linear layer; use 'all-linear' or patterns of: "),
    "clients": (["federation.num_clients=500"], "error: 86 training examples for 500 clients; lower federation.num_clients"),
    "a partition": (
        ["federation.partition.kind=dirichlet", "federation.partition.alpha=0.001", "federation.num_clients=30"],
        "error: federation.partition.alpha=0.001 leaves one of 30 clients without examples in every one of 11 draws; raise it",
    ),
    "an optimiser": (
        ["method=fedex_lora", "federation.server_optimizer.name=adam"],
        "error: federation.server_optimizer is not defined with method=fedex_lora: ",
    ),
    "an option": (["+method.options.truncate=3"], "error: method 'fed_sb' does not take these method.options (truncate)"),
    "a model": (["model.name=./nowhere"], "error: model.name=./nowhere: no such folder"),
    "a syntax": (["federation.names=[a,"], "error: "),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(call: Call, quick: list[str], case: str) -> None:
    overrides, message = MISTAKES[case]
    status, _, err = call("run", *quick, *overrides, "output=run")
    assert status == 2
    assert first_line(err).startswith(message)
    assert not Path("run").exists()


def test_an_empty_table_is_a_mistake(call: Call, quick: list[str], tmp_path: Path) -> None:
    status, _, err = call("run", *quick, table(tmp_path / "none.csv", "text,label"), "output=run")
    assert status == 2
    assert "no rows" in first_line(err)
    (tmp_path / "void.csv").write_text("", encoding="utf-8")
    status, _, err = call("run", *quick, f"data.path='{tmp_path / 'void.csv'}'", "output=run")
    assert status == 2
    assert first_line(err).startswith("error: ")


def test_a_label_of_the_test_part_alone_is_a_mistake(call: Call, quick: list[str], tmp_path: Path) -> None:
    table(tmp_path / "test.csv", "text,label", "a goal,sport", "a song,music")
    status, _, err = call("run", *quick, f"data.test_path='{tmp_path / 'test.csv'}'", "output=run")
    assert status == 2
    assert first_line(err).startswith("error: label 'music' (row 2) is seen only in the test part, the labels are film, sport, trade;")


def test_a_model_without_weights_is_a_mistake(call: Call, quick: list[str], tiny_bert: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_bytes((tiny_bert / name).read_bytes())
    status, _, err = call("run", *quick, f"model.name='{bare}'", "output=run")
    assert status == 2
    assert first_line(err).startswith(f"error: model.name={bare} holds no weights (*.safetensors); save them with save_pretrained")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_plots_can_wait_for_the_report(call: Call, quick: list[str], tmp_path: Path) -> None:
    assert call("run", *quick, "federation.num_rounds=1", "output=run")[0] == 0
    assert "](" not in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert not list(tmp_path.glob("run/*.png"))
    assert call("report", "run")[0] == 0
    assert "](quality.png)" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert len(list(tmp_path.glob("run/*.png"))) == 4


def test_a_run_leaves_its_folder_and_another_one_does_not_touch_it(call: Call, quick: list[str], tmp_path: Path) -> None:
    status, out, _ = call("run", *quick, "plots=true", "output=run")
    assert status == 0
    assert "accuracy" in out
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["exactness_gap"] < 1e-5
    assert len((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 3  # before the first round, and two
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "adapter", "report.md", "run.log"}

    before = contents(folder)
    status, _, err = call("run", *quick, "output=run", "seed=1")
    assert status == 2
    assert "run' already holds a run (config.yaml); choose another output=…" in first_line(err)
    assert contents(folder) == before


@pytest.mark.parametrize(("tokens", "told"), [(6, True), (16, False)])
def test_a_run_says_how_many_texts_it_cuts(call: Call, quick: list[str], tokens: int, told: bool) -> None:
    status, out, _ = call("run", *quick, "federation.num_rounds=1", f"train.max_length={tokens}")
    assert status == 0
    assert "3 classes: 'film', 'sport', 'trade'" in out
    assert (f"% of the training texts are longer than train.max_length={tokens} tokens" in out) is told


@pytest.mark.parametrize(("terminal", "asked", "speaks"), [
    (False, (), "json"), (True, (), "lines"), (False, ("progress=lines",), "lines"), (True, ("progress=json",), "json"),
])  # fmt: skip
def test_a_pipe_gets_json_and_a_terminal_lines_unless_told_otherwise(
    terminal: bool, asked: tuple[str, ...], speaks: str, call: Call, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    status, out, _ = call("run", *quick, "federation.num_rounds=1", "output=run", *asked)
    assert status == 0
    assert ("round 1/1" in out) is (speaks == "lines")
    assert all(line.startswith("{") for line in out.splitlines()) is (speaks == "json")
    # What stdout was is no property of the run, and may be another thing when it is resumed.
    assert f"progress: {asked[0].split('=')[1] if asked else 'auto'}\n" in Path("run/config.yaml").read_text()


@pytest.mark.parametrize("sweep", [(), ("-m", "seed=0,1")], ids=["one", "sweep"])
def test_with_json_nothing_else_is_on_standard_output(call: Call, quick: list[str], sweep: tuple[str, ...]) -> None:
    private = ["privacy=example", "privacy.epsilon=50", "privacy.accountant=rdp", "init.kind=weight_svd", "train.batch_size=4"]
    status, out, err = call("run", *quick, *private, "federation.num_rounds=1", "progress=json", *sweep)
    assert status == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert sum("summary" in row for row in rows) == (2 if sweep else 1)
    for remark in ("loading model and data …", "privacy: calibrating the noise of 3 clients …"):
        assert sum(row.get("remark") == remark for row in rows) == (2 if sweep else 1)
    assert "{" not in err


def test_a_run_that_stops_has_status_1(call: Call, quick: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A time limit that no client can keep."""
    status, _, err = call("run", *quick, "federation.timeout=1e-9", "output=run")
    assert status == 1
    assert next(line for line in err.splitlines() if line.startswith("error:")).startswith("error: the run stopped: ")


def test_the_round_that_stops_a_run_is_on_record(call: Call, quick: list[str]) -> None:
    status, _, err = call("run", *quick, "train.lr=1e30", "output=run")
    assert status == 1
    assert err.splitlines()[-1].startswith("error: the run stopped: round ")
    last = json.loads(Path("run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert last["round"] > 0
    assert set(last["failed"]) == {"client-0", "client-1", "client-2"}
    assert call("report", "run")[0] == 0


@pytest.mark.parametrize("output", ["taken", "taken/below/it"])
def test_an_output_on_a_file_is_a_mistake(call: Call, quick: list[str], output: str) -> None:
    Path("taken").write_text("mine", encoding="utf-8")
    status, _, err = call("run", *quick, f"output={output}")
    assert status == 2
    assert first_line(err) == f"error: output={output}: 'taken' is a file; choose another folder"
    assert Path("taken").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("cost", "-m", "seed=1,2"), "fedsb cost has no flag '-m'"),
        (("report", "--foo"), "fedsb report has no flag '--foo'"),
        (("export", "run", "--foo"), "unknown flag '--foo'"),
        (("export", "run", "out", "more"), "fedsb export takes 2 arguments at most, and 'more' is one more"),
    ],
)
def test_what_a_command_does_not_take_is_a_mistake(call: Call, arguments: tuple[str, ...], said: str) -> None:
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert first_line(err).startswith(f"error: {said}")


def test_a_sweep_over_a_pattern_is_a_mistake(call: Call) -> None:
    status, _, err = call("run", "-m", "method=glob(*)")
    assert status == 2
    assert first_line(err).startswith("error: cannot sweep over 'method=glob(*)'")


def test_the_configuration_is_shown_and_nothing_run(call: Call, quick: list[str], tmp_path: Path) -> None:
    status, out, _ = call("run", "--cfg", "job", *quick, "rank=3")
    assert status == 0
    assert "num_rounds: 2" in out
    assert "rank: 3" in out
    assert not list(tmp_path.glob("**/config.yaml"))


@pytest.mark.slow
def test_a_sweep_leaves_a_folder_a_job(call: Call, quick: list[str], tmp_path: Path) -> None:
    status, _, _ = call("run", "-m", "method=fedavg_lora,fedex_lora,fed_sb", *quick, "federation.num_rounds=1")
    assert status == 0
    found = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))["method"] for path in tmp_path.glob("multirun/*/*/*/summary.json")
    }
    assert found == {"0": "fedavg_lora", "1": "fedex_lora", "2": "fed_sb"}


def test_a_sweep_with_a_mistake_runs_nothing(call: Call, quick: list[str], tmp_path: Path) -> None:
    status, _, err = call("run", "-m", "method=fedavg_lora,fedex", *quick)
    assert status == 2
    assert first_line(err).startswith("error: unknown method 'fedex'")
    assert not list(tmp_path.glob("**/summary.json"))


def test_costs_are_printed(call: Call, quick: list[str]) -> None:
    status, out, _ = call("cost", *quick)
    assert status == 0
    for name in ("fed_sb", "fedavg_lora", "fedex_lora", "one-off"):
        assert name in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cots"], "error: unknown command 'cots' (did you mean 'cost'?); choose from cost, eval, export, report, run"),
        (["report"], "error: fedsb report needs the folder of a run"),
        (["export"], "error: fedsb export needs the folder of a run"),
        (["report", "nowhere"], "error: 'nowhere' holds no run"),
    ],
)
def test_other_commands_say_what_they_need(call: Call, arguments: list[str], message: str) -> None:
    status, _, err = call(*arguments)
    assert status == 2
    assert first_line(err).startswith(message)


def test_without_a_command_the_usage_is_shown(call: Call) -> None:
    assert call() == (2, f"{cli.USAGE}\n", "")
    assert call("--help") == (0, f"{cli.USAGE}\n", "")


def test_overrides_are_told_from_flags() -> None:
    given = ["--cfg", "job", "a=1", "-m", "--package", "x", "b=2"]
    assert overrides_in(given) == ["a=1", "b=2"]
    assert flags_in(given) == ["--cfg", "job", "-m", "--package", "x"]


def test_flags_may_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    """Hydra's own parser refuses one between two overrides."""
    with pytest.raises(SystemExit):
        main(["run", "seed=1", "--cfg", "job", "rank=3"])
    assert "seed: 1" in capsys.readouterr().out
    assert sweep_jobs(["a=1,2", "b=[1,2]", "c=x"]) == [["a=1", "b=[1,2]", "c=x"], ["a=2", "b=[1,2]", "c=x"]]
    with pytest.raises(UserError, match=r"cannot read 'a=\['"):
        sweep_jobs(["a=["])


def shell(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a fresh interpreter."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "plugins")])
    environment = {**os.environ, "PYTHONPATH": path, "FEDSB_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fedsb.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=240)


@pytest.mark.slow
def test_a_fresh_process_runs_and_exits(tmp_path: Path, quick: list[str]) -> None:
    done = shell(tmp_path, "run", *quick, "output=run")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.slow
def test_a_fresh_process_says_a_mistake_in_one_line(tmp_path: Path, quick: list[str]) -> None:
    done = shell(tmp_path, "run", *quick, "rank=33", "output=run")
    assert done.returncode == 2
    assert first_line(done.stderr).startswith("error: rank (33) exceeds")


@pytest.mark.slow
def test_a_job_that_fails_in_another_process_fails_the_sweep(tmp_path: Path, quick: list[str]) -> None:
    """A job that is a mistake counts for more than one that stops; one that ends between them changes nothing."""
    grid = ("rank=2,33", "federation.timeout=1e-9,60")
    done = shell(tmp_path, "run", "-m", *quick, "federation.num_rounds=1", "hydra/launcher=process", "output=sweep", *grid)
    assert done.returncode == 2, done.stderr
    stopped, *mistaken = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert stopped.startswith("error: the run stopped: ")
    assert len(mistaken) == 2
    assert all(line.startswith("error: rank (33) exceeds") for line in mistaken)
    assert "Traceback" not in done.stderr
    noted = [json.loads(line) for line in (tmp_path / "sweep" / "jobs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [job["status"] for job in noted] == [1, 0, 2, 2]
    assert [path.parent.name for path in (tmp_path / "sweep").glob("*/summary.json")] == ["1"]
