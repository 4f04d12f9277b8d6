"""A mistake is one line and exit status 2, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands.calls import Call, first_line


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
    "an option": (
        ["method.options.truncate=3"],
        "error: method.options.truncate: method 'fed_sb' has no such option; it has none; leave method.options.truncate out",
    ),
    "an option of a few": (
        ["method=flexlora", "method.options.spilt=left"],
        "error: method.options.spilt: method 'flexlora' has no such option (did you mean 'split'?); choose from energy, split",
    ),
    "an option of a family": (
        ["adapter.options.first=1"],
        "error: adapter.options.first: the family 'lora_sb' has no such option; choose from gamma",
    ),
    "a client's rank": (["method=flexlora", "rank=40", "federation.ranks=[2,40]"], "error: rank (40) exceeds min(out, in) = 32 of 'bert."),
    "too few rounds": (
        ["method=rolora", "federation.num_rounds=1"],
        "error: federation.num_rounds=1: the factors of method 'rolora' learn in 2 turns, one a round, and A would stay ",
    ),
    "ranks of two pairs": (["method=abba", "rank=16"], "error: rank (16), which needs 64 here, exceeds min(out, in) = 32 of 'bert."),
    "an optimiser under a mask": (
        ["method=abba_masked", "federation.server_optimizer.name=adam"],
        "error: federation.server_optimizer is not defined with method=abba_masked: it moves one mean ",
    ),
    "a private personal model": (
        ["method=fedsa_lora", "privacy=client", "privacy.epsilon=8", "federation.weighting=uniform"],
        "error: privacy.unit=client with method 'fedsa_lora': each client keeps its own B, head, ",
    ),
    "nothing left of a residual": (
        ["method=fedex_lora", "federation.wire_dtype=int8", "method.options.truncate=1"],
        "error: method.options.truncate=1 with federation.wire_dtype=int8: what makes up for the rounding of both means has rank 4 ",
    ),
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
        (("report", "--foo"), "unknown flag '--foo' (did you mean '--out'?); choose from --against, --metric, --out, --target, --tuned"),
        (("report", "run", "--target", "much"), "--target much is no number; give a value of the metric, as in --target 0.9"),
        (("export", "run", "--foo"), "unknown flag '--foo'"),
        (("run", "sweep.jobs=2"), "sweep.jobs=2 is of a sweep: add -m, or leave it out"),
        (("run", "-m", "seed=0,1", "sweep.jobs=0"), "sweep.jobs=0 is out of range; it must be auto, or at least 1"),
        (("run", "-m", "seed=0,1", "sweep=rate"), "unknown sweep 'rate' (did you mean 'rates'?); choose from none, rates"),
        (("run", "-m", "method=full", "sweep=rates"), "the grid of the sweep has nothing for method=full; leave that out, or add it to "),
        (("run", "-m", "rank=interval(1,4)"), "'rank=interval(1,4)' is to be drawn from: add sweep.samples=N, or name the values"),
        (("run", "-m", "seed=0,1", "hydra/sweeper=basic"), "hydra/sweeper=basic: a sweep is laid out here; name the values, draw them"),
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


def test_a_sweep_with_a_mistake_runs_nothing(call: Call, quick: list[str], tmp_path: Path) -> None:
    status, _, err = call("run", "-m", "method=fedavg_lora,fedex", *quick)
    assert status == 2
    assert first_line(err).startswith("error: unknown method 'fedex'")
    assert not list(tmp_path.glob("**/summary.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["cots"],
            "error: unknown command 'cots' (did you mean 'cost'?); "
            "choose from completion, cost, doctor, eval, export, federation, node, report, run, submit, watch, worker",
        ),
        (["report"], "error: fedsb report needs the folder of a run"),
        (["export"], "error: fedsb export needs the folder of a run"),
        (["report", "nowhere"], "error: 'nowhere' holds no run"),
    ],
)
def test_other_commands_say_what_they_need(call: Call, arguments: list[str], message: str) -> None:
    status, _, err = call(*arguments)
    assert status == 2
    assert first_line(err).startswith(message)
