"""``fedsb node check``: reads, counts, hashes and loads, says whether a run would be answered, and leaves no charge behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsb.federation.certificates import node_key
from fedsb.models.content import content_hash
from fedsb.privacy.accounting import epsilon_of
from fedsb.privacy.charges import Key
from fedsb.privacy.entries import Entry
from fedsb.privacy.naming import name_of_data
from fedsb.privacy.rows import hash_rows
from fedsb.privacy.shelf import Shelf
from tests.commands.calls import Call, first_line
from tests.strategies.private_runs import write_table

RUN = ("data=files", "federation.num_clients=2", "rank=2", "train.local_steps=2", "train.batch_size=10", "privacy.accountant=rdp")


def written(folder: Path, **said: Any) -> str:
    write_table(folder / "a.csv", 20)
    path = folder / "node.yaml"
    path.write_text(yaml.safe_dump({"client": "client-0", "data": {"path": "a.csv"}, "device": "cpu", **said}), encoding="utf-8")
    return str(path)


def test_a_hash_is_told_and_then_the_file_is_accepted_and_runs_are_held_against_it(call: Call, tiny_bert: Path, tmp_path: Path) -> None:
    model: dict[str, str] = {"name": "tiny", "path": str(tiny_bert)}
    said = {"privacy": {"unit": "example", "min_noise": 1, "max_grad_norm": 0.5}, "methods": ["fed_sb"], "limits": {"max_local_steps": 2}}
    right = content_hash(tiny_bert)
    status, out, err = call("node", "check", written(tmp_path, **said, models=[model]))
    assert status == 2
    assert first_line(err).startswith(f"error: models: the sha256 of 'tiny' is {right}, and none is given; write it into the file if")
    path = written(tmp_path, **said, models=[{**model, "sha256": right}])
    status, out, err = call("node", "check", path)
    assert (status, err) == (0, "")
    assert "a.csv: 20 rows of 3 classes, all of which can be used" in out
    assert f"tiny: sha256 {right}, 0.0 million parameters on cpu" in out
    assert (
        "privacy.unit=example; privacy.min_noise=1.0; privacy.max_grad_norm=0.5; methods=fed_sb; models=tiny; limits.max_local_steps=2"
        in out
    )
    run = (*RUN, "model=pretrained", "model.name=tiny", "privacy=example", "privacy.noise_multiplier=1", "privacy.max_grad_norm=0.5")
    status, out, err = call("node", "check", path, *run)
    assert (status, err) == (0, "")
    assert out.splitlines()[-1].startswith("this run  would be answered at epsilon ")
    assert ", 2 steps a round with noise 1.000: data=files " in out
    status, _, err = call("node", "check", path, *run, "train.local_epochs=3", "train.local_steps=null")
    assert (status, first_line(err)) == (2, "error: train.local_epochs: 6 steps of 20 examples, and this node's max_local_steps is 2")
    status, _, err = call("node", "check", path, *run, "federation.names=[klient-0,b]")
    assert (
        first_line(err)
        == "error: client=client-0: the run has no such client (did you mean 'klient-0'?); it has klient-0, b (federation.names)"
    )
    measured = ("federation.evaluate_clients=true", "privacy.eval_fraction=0.5", "federation.num_rounds=4", "data.test_path=x")
    status, out, err = call("node", "check", path, *run, *measured)
    assert (status, err) == (0, "")
    assert "held out  as a run asks (data.client_test_fraction)\n" in out
    assert ", 2 steps a round with noise 1.000, metrics 4 times with noise 1.000: data=files " in out
    assert not list((tmp_path / "home" / "ledgers").glob("*"))


@pytest.mark.parametrize(
    ("said", "held_out", "answers"),
    [
        ({}, "as a run asks", "any run: the file sets no bounds"),
        ({"evaluate": False}, "nothing is evaluated", "evaluate=False"),
        ({"data": {"path": "a.csv", "test_fraction": 0.2}}, "20% of the rows", "any run"),
        ({"data": {"path": "a.csv", "test_path": "apart.csv"}}, "TMP/apart.csv: 9 rows of 3 classes", "any run"),
    ],
)
def test_what_is_evaluated_on_is_told(said: dict[str, Any], held_out: str, answers: str, call: Call, tmp_path: Path) -> None:
    write_table(tmp_path / "apart.csv", 9)
    status, out, err = call("node", "check", written(tmp_path, **said))
    assert (status, err) == (0, "")
    assert f"held out  {held_out.replace('TMP', str(tmp_path))}" in out
    assert f"answers   {answers}" in out


def test_rows_that_cannot_be_used_are_counted(call: Call, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"question": "he said", "answer": "yes"}\n{"question": "no"}\nnothing\n', encoding="utf-8")
    data = {"path": "b.jsonl", "prompt": "question", "response": "answer"}
    status, out, _ = call("node", "check", written(tmp_path, data=data, privacy={"unit": "example"}))
    assert status == 0
    assert "b.jsonl: 3 rows, 2 of which cannot be used" in out
    assert "model     any\n" in out
    status, _, err = call("node", "check", written(tmp_path, data=data))
    assert status == 2
    assert "b.jsonl cannot be read as .jsonl (line 3: " in first_line(err)


def test_what_data_have_cost_and_what_a_run_would_is_told(call: Call, tiny_bert: Path, tmp_path: Path) -> None:
    path = written(tmp_path, privacy={"unit": "example", "max_epsilon": 8})
    shelf = Shelf(tmp_path / "home" / "ledgers")
    rows = hash_rows(("a text",), None, shelf.salt)
    shelf.open(name_of_data("client-0", str(tmp_path / "a.csv")), rows).charge(Key("1", 1, "train"), (Entry("gaussian", 0.5, 2.0, 4),))
    spent = epsilon_of((Entry("gaussian", 0.5, 2.0, 4),), 1e-5)
    assert f"ledger    epsilon {spent:.3f} of 8 spent at delta 1e-05" in call("node", "check", path)[1]
    run = ("model=pretrained", f"model.name='{tiny_bert}'", *RUN, "privacy=example", "privacy.epsilon=3")
    for most, of, status in ((3.1 + spent, "max_epsilon", 0), (3.0, "max_epsilon", 2), (3.0, "max_epsilon_run", 0)):
        found, out, err = call("node", "check", written(tmp_path, privacy={"unit": "example", of: most}), *run)
        assert found == status, err
        assert (
            first_line(err).startswith("error: the node's max_epsilon=3 would be exceeded: epsilon ") if status else "at epsilon 2.9" in out
        )
    status, _, err = call("node", "check", written(tmp_path, privacy={"unit": "example", "min_noise": 9}), *run)
    assert (status, first_line(err)[:32]) == (2, "error: privacy.noise_multiplier=")


def test_what_is_wrong_is_one_line(call: Call, tmp_path: Path) -> None:
    for arguments, line in {
        (): "fedsb node takes what to do, and the file of a node: fedsb node check /etc/fedsb/node.yaml",
        ("check",): "fedsb node takes what to do, and the file of a node: fedsb node check /etc/fedsb/node.yaml",
        ("check", "gone.yaml"): f"'{tmp_path / 'gone.yaml'}' can't be read (no such file or directory); name the node's own file",
        ("check", "node.yaml", "--now"): "fedsb node has no flag '--now'; see fedsb node --help",
    }.items():
        assert call("node", *arguments)[0] == 2
        assert first_line(call("node", *arguments)[2]) == f"error: {line}"
    status, out, err = call("node", "check", written(tmp_path, devise="cpu"))
    assert (status, out) == (2, "")
    assert first_line(err).startswith("error: unknown key 'devise' in ")


def test_secure_sums_that_any_server_can_see_through_are_told(call: Call, tmp_path: Path) -> None:
    status, out, err = call("node", "check", written(tmp_path, secure={"required": True}))
    assert (status, err) == (0, "")
    assert "secure    signs nothing; takes any keys of others\n" in out
    assert "caution   secure.required without secure.peers: a server that serves clients of its own making" in out
    assert "caution" not in call("node", "check", written(tmp_path))[1]
    status, _, err = call("node", "check", written(tmp_path, secure={"min_clients": 1}))
    assert first_line(err).startswith("error: secure.min_clients=1 in ")


def test_keys_of_secure_sums_are_read(call: Call, tmp_path: Path) -> None:
    for name in ("client-0", "client-1"):
        node_key(tmp_path / name)
    (tmp_path / "peers").write_text("".join(f"{name} {(tmp_path / f'{name}.pub').read_text()}" for name in ("client-0", "client-1")))
    secure = {"required": True, "key": "client-0", "peers": "peers"}
    status, out, err = call("node", "check", written(tmp_path, secure=secure))
    assert (status, err) == (0, "")
    assert f"secure    signs with {tmp_path / 'client-0'}; holds others to the keys of client-1\n" in out
    status, _, err = call("node", "check", written(tmp_path, secure=secure), *RUN)
    assert (status, first_line(err)) == (2, "error: federation.secure_sum=false: this node gives its part to secure sums alone")
    assert "caution   secure.required without secure.min_clients: " in out
    (tmp_path / "client-0").chmod(0o640)
    status, out, err = call("node", "check", written(tmp_path, secure={**secure, "min_clients": 3}))
    assert (status, err) == (0, "")
    assert [line for line in out.splitlines() if line.startswith("caution")] == [
        f"caution   secure.key: '{tmp_path / 'client-0'}' is open to others than its user (mode 0640): chmod 600 '{tmp_path / 'client-0'}'"
    ]
    assert "answers   secure.min_clients=3\n" in out
    status, _, err = call("node", "check", written(tmp_path, secure={"key": "client-0.pub"}))
    assert "can't be read as a private key" in first_line(err)
