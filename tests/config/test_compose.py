"""Every file of ``conf/`` composes, and every mistake gets one line with the nearest right spelling."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsb.config.checks import CHOICES, RANGES
from fedsb.config.compose import as_dict, as_yaml, load, read
from fedsb.config.derived import client_names, start_kind
from fedsb.config.explaining import known_keys
from fedsb.core.cohort import cohort_size
from fedsb.core.errors import UserError
from fedsb.core.folders import conf_dir
from strategies import STRATEGIES

GROUPS = sorted(path.name for path in conf_dir().iterdir() if path.is_dir())
OPTIONS = [(path.parent.name, path.stem) for path in sorted(conf_dir().glob("*/*.yaml"))]
# What an option cannot do without.
NEEDS = {
    ("model", "pretrained"): ["model.name=somewhere"],
    ("privacy", "example"): ["privacy.epsilon=3"],
    ("privacy", "client"): ["privacy.noise_multiplier=1", "federation.weighting=uniform"],
}


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_file_composes(group: str, option: str) -> None:
    config = load([f"{group}={option}", *NEEDS.get((group, option), [])])
    assert config.federation.num_clients >= 1 or config.federation.partition.kind == "natural"  # where the data tell


def test_there_is_a_file_a_method_and_no_other() -> None:
    assert {path.stem for path in (conf_dir() / "method").glob("*.yaml")} == set(STRATEGIES)
    for name in STRATEGIES:
        assert load([f"method={name}"]).method.name == name


def test_equal_overrides_are_composed_once() -> None:
    """Composing takes a third of a second of CPU, and the command line, the server and a simulated client ask for the same."""
    asked = ["rank=3", "method=fedex_lora"]
    assert load(asked) is load(tuple(asked))
    assert load(["method=fedex_lora"]) != load(asked)
    for _ in range(2):
        with pytest.raises(UserError, match="rnak"):
            load(["rnak=3"])


def test_defaults_stand_in_the_files_alone() -> None:
    """No dataclass of the schema has a default, so a key that a file forgets is an error and not a silent value."""
    text = (Path(__file__).resolve().parents[2] / "fedsb" / "config" / "schema.py").read_text(encoding="utf-8")
    assert not re.findall(r"^    \w+: .* = ", text, flags=re.MULTILINE)


@pytest.mark.parametrize("method", sorted(STRATEGIES))
def test_a_configuration_comes_back_from_its_file(tmp_path: Path, method: str) -> None:
    config = load([f"method={method}", "adapter=attention", "federation.names=[a,b]", "federation.num_clients=2"])
    (tmp_path / "config.yaml").write_text(as_yaml(config), encoding="utf-8")
    assert read(tmp_path / "config.yaml") == config
    assert yaml.safe_load(as_yaml(config)) == as_dict(config)


NO_CONFIGURATIONS = {
    "half a line": (b"seed: 1\nmethod:\n  name: fed_sb\n  ad", r"be read as a run.s configuration \(.*could not find expected ':'"),
    "half a bracket": (b"seed: 1\nfederation:\n  names: [a,", r"be read as a run.s configuration \(.*line 3, column 13"),
    "half a value": (b"seed: 1\nmethod: n", r"be read as a run.s configuration \(method=n is not valid"),
    "bytes": (b"seed: \xff\xfe", r"be read as a run.s configuration \(.*can't decode byte 0xff"),
    "a list": (b"- seed\n", r"be read as a run.s configuration \(Cannot merge DictConfig with ListConfig"),
}


@pytest.mark.parametrize("name", NO_CONFIGURATIONS)
def test_a_file_that_is_no_configuration_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    content, message = NO_CONFIGURATIONS[name]
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"'{path}' ")
    assert str(caught.value).count(str(path)) == 1
    assert "\n" not in str(caught.value)


def test_one_rank_reaches_the_scale() -> None:
    assert (load(["rank=4"]).adapter.rank, load(["rank=4"]).adapter.alpha) == (4, 4.0)  # fed_sb: alpha = r
    assert (load(["method=fedavg_lora", "rank=4"]).adapter.rank, load(["method=fedavg_lora"]).adapter.alpha) == (4, 8.0)
    assert load(["method=fedex_lora", "method.lr=0.5"]).train.lr == 0.5


@pytest.mark.parametrize("method", ["flora", "flexlora"])
def test_the_largest_of_the_clients_ranks_is_the_rank(method: str) -> None:
    assert load([f"method={method}", "federation.ranks=[4,32,16]"]).adapter.rank == 32
    assert load([f"method={method}"]).adapter.rank == load([f"method={method}"]).method.rank


@pytest.mark.parametrize(
    ("given", "said"),
    {
        ("rank=8", "federation.ranks=[4,16]"): r"^rank=8 is not the largest of federation\.ranks=\[4, 16\].* out, or set rank=16$",
        ("federation.ranks=[]",): r"^federation\.ranks=\[\] must name ranks of at least 1, as in \[4,8,16\]",
        ("federation.ranks=[0,4]",): r"^federation\.ranks=\[0, 4\] must name ranks of at least 1",
        ("federation.ranks=4",): r"^federation\.ranks=4 is not valid: .*a list, as in \[a,b\]",
    }.items(),
)
def test_ranks_that_cannot_be_are_told(given: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(["method=flexlora", *given])


MISTAKES = {
    "method=fedex": r"unknown method 'fedex' \(did you mean 'fedex_lora'\?\); choose from abba, abba_alternating, ",
    "model=minillm": r"unknown model 'minillm' \(did you mean 'minilm'\?\); choose from ",
    "data=bbc": r"unknown data 'bbc'.*; choose from bbc_news, files, hub, reasoning_gym",
    "methode=fed_sb": r"unknown key 'methode' \(did you mean 'method'\?\)",
    "model.config={model_type:bert}": r"'model\.config' is not in the chosen model file; add it with a plus: \+model\.config=…",
    "federation.num_round=3": r"unknown key 'federation\.num_round' \(did you mean 'federation\.num_rounds'\?\); known here: federation\.",
    "num_rounds=3": r"unknown key 'num_rounds' \(did you mean '(federation\.)?num_rounds'\?\)",
    "+train.learning_rate=1": r"unknown key 'train\.learning_rate'.*; known here: .*train\.lr",
    "train.lr=fast": r"train\.lr=fast is not valid: input should be a valid number",
    "train.lr=-1": r"train\.lr=-1\.0 is out of range; it must be above 0",
    "train.lr=nan": r"train\.lr=nan is not valid: input should be a finite number",
    "rank=0": r"rank=0 is out of range; it must be at least 1",
    "rank=2.5": r"rank=2\.5 is not valid: input should be a valid integer",
    "federation.fraction=1.5": r"federation\.fraction=1\.5 is out of range; it must be in \(0, 1\]",
    "train.optimizer=adam": r"unknown train\.optimizer 'adam' \(did you mean 'adamw'\?\); choose from adamw, adamw8bit, sgd",
    "federation.weighting=example": r"unknown federation\.weighting 'example' \(did you mean 'examples'\?\)",
    "federation.server_optimizer.name=fedadam": r"unknown federation\.server_optimizer\.name 'fedadam' \(did you mean 'adam'\?\)",
    "init.kind=gradients": r"unknown init\.kind 'gradients' \(did you mean 'gradient'\?\); choose from gradient, null, olora, orthogonal",
    "federation.server_optimizer.betas=[0.9]": r"federation\.server_optimizer\.betas must have more values than 1$",
    "runtime.stack=3x": r"^runtime\.stack=3x is not valid: input should be a valid integer.*; or input should be 'auto'$",
    "model.head=3": r"^model\.head=3 is not valid: input should be a valid string; or it must be a list, as in \[a,b\]$",
    "device=gpu": r"unknown device 'gpu'.*; choose from auto, cpu, cuda",
    "model=pretrained": r"model\.name must be given: add model\.name=…",
    "federation.wire_dtype=float16": r"unknown federation\.wire_dtype 'float16' .*; choose from bfloat16, float32, int8",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_gets_one_line(override: str) -> None:
    with pytest.raises(UserError, match=MISTAKES[override]) as caught:
        load([override])
    assert "\n" not in str(caught.value)


JOINT = {
    r"evaluate_clients=true needs held-out examples": ["federation.evaluate_clients=true"],
    r"evaluate_clients=False: method 'fedsa_lora' needs federation.evaluate_clients=true; leave federation.evaluate_clients out": [
        "method=fedsa_lora",
        "federation.evaluate_clients=false",
    ],
    r"fedsa_lora.yaml: needs names 'federation.evaluates', which is no key": [
        "method=fedsa_lora",
        'method.needs=["federation.evaluates=true"]',
    ],
    r"method\.adapter=lora is not that of method 'fed_sb'; it must be lora_sb": ["method.adapter=lora"],
    r"unknown method 'fedex' \(did you mean 'fedex_lora'\?\)": ["method.name=fedex"],
    r"momentum=-1\.0 is out of range": ["federation.server_optimizer.momentum=-1"],
    r"init\.update=sign with init\.evidence=clients: .* use init\.evidence=public .* or init\.update=sgd": ["init.update=sign"],
    r"init\.evidence=public needs text the server may hold; set data\.public_path=… or data\.public_fraction=0\.05": [
        "init.evidence=public"
    ],
    r"init\.kind=weight_svd is not defined for method 'fedavg_lora'; choose from random, gradient": [
        "method=fedavg_lora",
        "init.kind=weight_svd",
    ],
    r"federation\.names gives 2 different names for federation\.num_clients=3": ["federation.names=[a,b,b]", "federation.num_clients=3"],
    r"federation\.min_replies=4 exceeds the 3 clients a round draws; lower it": [
        "federation.min_replies=4",
        "federation.num_clients=5",
        "federation.fraction=0.6",
    ],
    r"data\.text=\[a, b\] with data\.task=causal_lm: .* join them into one column": ["data.text=[a,b]", "data.task=causal_lm"],
    r"^federation\.num_rounds=1: the factors of method 'rolora' learn in 2 turns, .* and A would stay .*; use at least 2, or another": [
        "method=rolora",
        "federation.num_rounds=1",
    ],
    r"^federation\.num_rounds=3: the factors of method 'abba_alternating' learn in 4 turns, .* and A1 would stay": [
        "method=abba_alternating",
        "federation.num_rounds=3",
    ],
    r"^federation\.num_rounds=1: the factors of method 'centralized' learn in 2 turns": [
        "method=centralized",
        "method.adapter=rolora",
        "federation.num_rounds=1",
    ],
    r"^train\.compile=true is not for clients side by side; set runtime\.stack=1": ["train.compile=true", "runtime.stack=2"],
    r"^train\.accumulation=2 with privacy\.unit=example: a private sample is split by privacy\.max_batch": [
        "train.accumulation=2",
        "privacy=example",
        "privacy.epsilon=3",
    ],
    r"^train\.gradient_checkpointing=true with privacy\.unit=example: what is computed twice": [
        "train.gradient_checkpointing=true",
        "privacy=example",
        "privacy.epsilon=3",
    ],
    r"^model\.dtype=float16 with privacy\.unit=example: .* use model\.dtype=bfloat16": [
        "model.dtype=float16",
        "privacy=example",
        "privacy.epsilon=3",
    ],
    r"^train\.autocast=bfloat16 with model\.dtype=float16: ": ["train.autocast=bfloat16", "model.dtype=float16"],
    r"^model\.device_map=auto is not for clients side by side; set runtime\.stack=1": ["model.device_map=auto", "runtime.stack=2"],
    r"^model\.device_map=auto with privacy\.unit=example: the norm of .* use model\.quantize=int4": [
        "model.device_map=auto",
        "privacy=example",
        "privacy.epsilon=3",
    ],
    r"^train\.compile=true with model\.device_map=auto: ": ["model.device_map=auto", "train.compile=true"],
    r"^device=cpu with model\.device_map=auto: .* leave one of the two out": ["model.device_map=auto", "device=cpu"],
    r"^device=cuda:1 with model\.device_map=auto: ": ["model.device_map=auto", "device=cuda:1"],
    r"data\.text=\[b, a\] with data\.task=causal_lm: ": ["data.text=[b,a]", "model.task=causal_lm"],
}


@pytest.mark.parametrize("message", JOINT)
def test_keys_that_do_not_go_together_are_named(message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(JOINT[message])


def test_joint_rules_leave_alone_what_is_not_used() -> None:
    assert load(["init.update=sign", "init.evidence=public", "data.public_fraction=0.1"]).init.update == "sign"
    assert load(["init.evidence=public", "init.kind=orthogonal"]).init.kind == "orthogonal"
    assert load(["model.device_map=auto", "device=cuda", "train.gradient_checkpointing=true"]).model.device_map == "auto"


def test_tables_of_values_name_keys_that_exist() -> None:
    keys = {*known_keys(), "method.adapter"}
    assert set(CHOICES) <= keys
    assert set(RANGES) <= keys


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 200), st.floats(0.001, 1))
def test_a_cohort_is_the_nearest_number_of_clients_and_never_empty(clients: int, fraction: float) -> None:
    size = cohort_size(clients, fraction)
    assert 1 <= size <= clients
    assert size == 1 or abs(size - clients * fraction) <= 0.5


def test_names_of_clients() -> None:
    assert client_names(load(["federation.num_clients=2"])) == ("client-0", "client-1")
    assert client_names(load(["federation.num_clients=2", "federation.names=[bonn,oslo]"])) == ("bonn", "oslo")


def test_a_start_left_open_is_the_methods_first() -> None:
    assert start_kind(load()) == "gradient"
    assert start_kind(load(["method=fedex_lora"])) == "random"
    assert start_kind(load(["init.kind=weight_svd"])) == "weight_svd"


@pytest.mark.parametrize(("task", "kind"), [("classification", "dirichlet"), ("regression", "iid"), ("causal_lm", "iid")])
def test_a_partition_left_open_fits_the_task(task: str, kind: str) -> None:
    assert load([f"data.task={task}"]).federation.partition.kind == kind
