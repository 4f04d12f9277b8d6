"""Each thing that an operator says in ``node.yaml``: refused by its code one step beyond, answered at the bound, by the real ClientApp."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import join
from typing import Any

import pytest
import yaml
from flwr.app import ConfigRecord, Message, RecordDict

from fedsb.app.asked import asked_in, config_in
from fedsb.client_app import app
from fedsb.core.folders import home
from fedsb.models.content import content_hash
from fedsb.node.policy import RULES
from fedsb.node.reading import FILE
from fedsb.privacy.codes import CODES
from fedsb.wire.messages import Reply, decode_reply
from tests.strategies.federations import KeepingGrid

ROWS = 20
NOISE = ("privacy=example", "privacy.noise_multiplier=1")
TARGET = ("privacy=example", "privacy.epsilon=3", "privacy.accountant=rdp")
BATCH = "train.batch_size=10"
UNIT = {"unit": "example"}


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))


def grid_of(folder: Path, said: dict[str, Any], *overrides: str) -> KeepingGrid:
    """Return a grid with one node whose operator has said something, and whose table has four columns."""
    names = ("text", "label", "note", "class")
    rows = [",".join(names), *(f"some words {i},{'xy'[i % 2]},own words {i},{'uv'[i % 2]}" for i in range(ROWS))]
    (folder / "a.csv").write_text("\n".join(rows), encoding="utf-8")
    (folder / "node.yaml").write_text(yaml.safe_dump({"client": "a", **said, "data": {"path": "a.csv", **said.get("data", {})}}))
    told = join(["data=files", "federation.names=[a]", "federation.num_clients=1", *overrides])
    return KeepingGrid(app, {"overrides": told}, {1: {FILE: str(folder / "node.yaml")}})


def answer(
    folder: Path, said: dict[str, Any], *overrides: str, labels: tuple[str, ...] = ("x", "y"), kind: str = "query.describe"
) -> Reply:
    grid = grid_of(folder, said, *overrides)
    config = {"client": "a", "round": 1, "clients": "[]", "labels": json.dumps(labels), "stage": "", "frozen": "", "layout": 0}
    message = Message(RecordDict({"config": ConfigRecord(config)}), 1, kind)  # type: ignore[dict-item]
    message.metadata.__dict__["_message_id"] = "asked"
    content = app(message, grid._contexts[1]).content
    counts = content.metric_records["metrics"].get("num-examples")
    if counts is not None:
        assert counts == [ROWS]
        return Reply({}, 0, ROWS, {})
    return decode_reply(content)


SUMMED = (
    *("init.kind=orthogonal", "federation.names=[a,b,c,d,e]", "federation.num_clients=5"),
    *("federation.secure_sum=true", "federation.exactness=false"),
)

# key of node.yaml -> what is said, the overrides one step beyond, those at the bound, and the key at fault.
LIMITS: dict[str, tuple[dict[str, Any], tuple[str, ...], tuple[str, ...], str]] = {
    "privacy.unit": ({"privacy": UNIT}, (), NOISE, "privacy.unit"),
    "privacy.min_noise": (
        {"privacy": {**UNIT, "min_noise": 1}},
        ("privacy=example", "privacy.noise_multiplier=0.99"),
        NOISE,
        "privacy.noise_multiplier",
    ),
    "privacy.max_epsilon": ({"privacy": {**UNIT, "max_epsilon": 3}}, (*TARGET, "privacy.epsilon=3.1"), TARGET, "privacy.epsilon"),
    "privacy.max_epsilon_run": ({"privacy": {**UNIT, "max_epsilon_run": 3}}, (*TARGET, "privacy.epsilon=3.1"), TARGET, "privacy.epsilon"),
    "privacy.max_grad_norm": (
        {"privacy": {**UNIT, "max_grad_norm": 0.5}},
        (*NOISE, "privacy.max_grad_norm=0.51"),
        (*NOISE, "privacy.max_grad_norm=0.5"),
        "privacy.max_grad_norm",
    ),
    "an adaptive norm": (
        {"privacy": {**UNIT, "max_grad_norm": 9}},
        (*NOISE, "privacy.clipping=adaptive"),
        (*NOISE, "privacy.clipping=per_layer"),
        "privacy.clipping",
    ),
    "secure.required": (
        {"secure": {"required": True}},
        ("init.kind=orthogonal",),
        (
            "init.kind=orthogonal",
            "federation.names=[a,b]",
            "federation.num_clients=2",
            "federation.secure_sum=true",
            "federation.exactness=false",
        ),
        "federation.secure_sum",
    ),
    "secure.min_clients": (
        {"secure": {"min_clients": 4}},
        (*SUMMED, "federation.secure_dropout=0.4"),  # 3 of 5 must stay
        (*SUMMED, "federation.secure_dropout=0.2"),
        "federation.num_clients",
    ),
    "methods": ({"methods": ["ffa_lora"]}, ("method=fed_sb",), ("method=ffa_lora",), "method.name"),
    "limits.max_local_epochs": (
        {"limits": {"max_local_epochs": 3}},
        ("train.local_epochs=4",),
        ("train.local_epochs=3",),
        "train.local_epochs",
    ),
    "epochs by steps": (
        {"limits": {"max_local_epochs": 3}},
        (BATCH, "train.local_steps=7"),
        (BATCH, "train.local_steps=6"),
        "train.local_steps",
    ),
    "limits.max_local_steps": ({"limits": {"max_local_steps": 5}}, ("train.local_steps=6",), ("train.local_steps=5",), "train.local_steps"),
    "steps by epochs": (
        {"limits": {"max_local_steps": 4}},
        (BATCH, "train.local_epochs=3"),
        (BATCH, "train.local_epochs=2"),
        "train.local_epochs",
    ),
    "limits.max_examples_per_round": (
        {"limits": {"max_examples_per_round": 40}},
        ("train.local_epochs=3",),
        ("train.local_epochs=2",),
        "train.local_epochs",
    ),
    "examples of evidence": (
        {"limits": {"max_examples_per_round": 10}},
        (BATCH, "train.local_steps=1", "init.kind=gradient", "init.num_examples=11"),
        (BATCH, "train.local_steps=1", "init.kind=gradient", "init.num_examples=10"),
        "init.num_examples",
    ),
    "data.text": ({"data": {"text": "note"}}, (), ("data.task=causal_lm", "data.label=null"), "data.label"),
}


@pytest.mark.parametrize("case", LIMITS)
def test_a_request_is_refused_beyond_the_bound_and_answered_at_it(case: str, tmp_path: Path) -> None:
    said, beyond, at, key = LIMITS[case]
    refused = answer(tmp_path, said, *beyond)
    assert (refused.code, refused.key) == (CODES["policy"].number, key)
    labels = () if "data.task=causal_lm" in at else ("x", "y")
    assert answer(tmp_path, said, *at, labels=labels).num_examples == ROWS


def test_every_rule_is_tried() -> None:
    elsewhere = {"data.path", "data.labels", "models", "evaluate"}  # tests.node.test_policy, below, and in whole runs
    assert {rule.key for rule in RULES} <= LIMITS.keys() | elsewhere


@pytest.mark.parametrize("kind", ["query.describe", "train", "train.evidence", "evaluate"])
def test_what_follows_from_the_configuration_is_refused_before_data_are_read(kind: str, tmp_path: Path) -> None:
    said = {"limits": {"max_local_steps": 5}}
    assert answer(tmp_path, said, "train.local_steps=6", kind=kind).code == CODES["policy"].number
    assert not (home() / "ledgers").exists()


def test_classes_are_those_that_the_operator_has_named(tmp_path: Path) -> None:
    for own in (["y", "x"], {"x": "u", "y": "v"}):
        said = {"data": {"labels": own, **({"label": "class"} if isinstance(own, dict) else {"label": "label"}), "text": "note"}}
        assert answer(tmp_path, said).num_examples == ROWS
        for labels in (("x", "z"), ("x",), ("x", "y", "z"), ()):
            refused = answer(tmp_path, said, labels=labels)
            assert (refused.code, refused.key) == (CODES["policy"].number, "data.labels")


def test_no_column_is_read_that_the_operator_has_not_named(tmp_path: Path) -> None:
    """A run's names stand for its kinds of columns alone."""
    language = ("data.task=causal_lm", "data.label=null")
    said = {"data": {"prompt": "note", "response": "class"}}
    assert answer(tmp_path, said, *language, "data.prompt=text", "data.response=secret", labels=()).num_examples == ROWS
    for more, key in {
        ("data.text=text",): "data.text",
        ("data.template='{text} {label}'",): "data.template",
        ("data.prompt=note", "data.response=class", "data.system='about {text}'"): "data.system",
        ("data.prompt=note", "data.response=class", "data.choices=label"): "data.choices",
    }.items():
        refused = answer(tmp_path, said, *language, *more, labels=())
        assert (refused.code, refused.key) == (CODES["policy"].number, key)
    pair = answer(tmp_path, {"data": {"text": "note", "label": "class"}}, "data.text=[text,note]")
    assert (pair.code, pair.key) == (CODES["policy"].number, "data.text")


def test_the_node_s_own_stands_in_place_of_what_the_run_says(tmp_path: Path) -> None:
    own = {"text": "note", "label": "class", "encoding": "latin-1", "train_split": "mine", "labels": {"x": "u", "y": "v"}}
    said = {"data": own, "device": "cpu", "cache": {"gb": 2, "days": 3}}
    asked = ("data.path=/other", "data.test_path=/other/test.csv", "data.encoding=cp1252", "device=auto", "frozen.cache_gb=500")
    context = grid_of(tmp_path, said, *asked)._contexts[1]
    there = config_in(context)
    d = there.data
    assert (d.text, d.label, d.encoding, d.train_split) == ("note", "class", "latin-1", "mine")
    assert (d.path, d.test_path, d.public_path) == (None, None, None)
    assert (there.device, there.frozen.cache_gb, there.frozen.cache_days) == ("cpu", 2.0, 3.0)
    assert asked_in(context).data.path == "/other"
    spread = ("model.device_map=auto", "device=cuda")
    for device, device_map in {"cuda": "auto", "cuda:1": None}.items():
        there = config_in(grid_of(tmp_path, {"device": device}, *spread)._contexts[1])
        assert (there.device, there.model.device_map) == (device, device_map)


def test_a_model_is_known_by_name_and_content(tmp_path: Path) -> None:
    model, poisoned = tmp_path / "model", tmp_path / "poisoned"
    for folder, text in ((model, "weights"), (poisoned, "others")):
        folder.mkdir()
        (folder / "model.safetensors").write_text(text)
    right = content_hash(model)

    def said(name: str, **more: str) -> dict[str, Any]:
        return {"models": [{"name": name, "sha256": right, **more}]}

    def asked(allowed: dict[str, Any], name: str, *more: str) -> Reply:
        return answer(tmp_path, allowed, "model=pretrained", f"model.name='{name}'", *more)

    assert asked(said(str(model)), str(model)).num_examples == ROWS
    assert asked(said("some/id", path="model"), "some/id", "model.revision=main").num_examples == ROWS
    for allowed, name, more, key in (
        (said(str(model)), str(poisoned), (), "model.name"),
        (said(str(poisoned)), str(poisoned), (), "model.name"),  # the name is allowed, and the content is not
        (said("some/id", path="poisoned"), "some/id", (), "model.name"),
        (said("some/id"), "some/id", (), "model.name"),
        (said(str(model)), str(model), (f"model.tokenizer='{poisoned}'",), "model.tokenizer"),
        (said(str(model)), str(model), ("model.attn_implementation=some/kernel",), "model.attn_implementation"),
        (said(str(model)), str(model), ("model.kind=config",), "model.kind"),
    ):
        refused = asked(allowed, name, *more)
        assert (refused.code, refused.key) == (CODES["model"].number, key)
    (model / "model.safetensors").write_text("changed")
    assert asked(said(str(model)), str(model)).code == CODES["model"].number
