"""``node.yaml`` is held to the letter, and what it says is the object that ``--node-config`` makes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsb.config.explaining import known_keys
from fedsb.core.errors import UserError
from fedsb.models.content import KEPT, content_hash
from fedsb.node.file import leaves, read_file
from fedsb.node.policy import RULES
from fedsb.node.reading import FILE, name_of, read_node
from fedsb.node.refusals import KEYS
from fedsb.node.settings import NodeConfig, OwnModel
from fedsb.node.values import VALUES, NodeConfigError

HASH = "0" * 64
DOCS = Path(__file__).resolve().parents[2] / "docs"
SHELL = (
    r"find -L . -type f -not -path '*/.*' -not -path '*/__pycache__/*' -printf '%P\n' | LC_ALL=C sort | xargs -d '\n' sha256sum | sha256sum"
)
BASE: dict[str, Any] = {"client": "a", "data": {"path": "a.csv"}}
STRICT: dict[str, Any] = {**BASE, "privacy": {"unit": "example"}}


def written(folder: Path, content: dict[str, Any] | str) -> Path:
    (folder / "a.csv").touch()
    path = folder / "node.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def test_what_may_be_said_is_in_one_table_and_every_key_of_it_may_be_named_in_a_reply() -> None:
    assert set(known_keys(NodeConfig)) == set(VALUES)
    assert {rule.key for rule in RULES} < set(VALUES) < KEYS


def test_both_ways_to_say_it_make_one_object(tmp_path: Path) -> None:
    said = {"unit": "example", "max_epsilon": 3, "max_delta": 1e-6, "min_noise": 0.5, "ledger": "ward"}
    path = written(tmp_path, {**BASE, "rank": 4, "privacy": said})
    pairs = {"client": "a", "data-path": str(tmp_path / "a.csv"), "rank": "4", "privacy": "example", "max-epsilon": "3"}
    more = {"max-delta": "1e-6", "min-noise": "0.5", "ledger": "ward"}
    assert read_node({FILE: str(path)}) == read_node({**pairs, **more})


def test_paths_are_below_the_file_and_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    text = (
        "client: a\ndata: {path: ./a.csv}\ncache: {folder: ../c, gb: 2}\nmodels: [{name: x, sha256: '%s', path: m}]\n"
        "privacy: {unit: example, max_epsilon: 3, max_delta: 1e-5}\n"
    )
    node = read_file(written(tmp_path, text % HASH))
    assert node.data_path == str(tmp_path / "a.csv")
    assert node.cache_folder == tmp_path.parent / "c"
    assert node.models == (OwnModel("x", HASH, str(tmp_path / "m")),)
    assert node.privacy.max_delta == 1e-5


MISTAKES: dict[str, tuple[dict[str, Any] | str, str, str | None]] = {
    "an unknown key": ({**BASE, "privcy": {}}, "unknown key 'privcy' in {}(did you mean 'privacy'?); known here: cache, client, ", None),
    "one in a group": (
        {**BASE, "privacy": {"unit": "example", "max_epsilom": 1}},
        "unknown key 'privacy.max_epsilom' in {}(did you mean 'max_epsilon'?); known here: ledger, max_delta",
        None,
    ),
    "one of a model": (
        {**BASE, "models": [{"nam": "x"}]},
        "unknown key 'models.0.nam' in {}(did you mean 'name'?); known here: name, ",
        None,
    ),
    "no client": ({"data": {"path": "a.csv"}}, "client is missing in {}; add it", "client"),
    "no path": ({"client": "a", "data": {}}, "data.path is missing in {}; add it", "data.path"),
    "a truth": (
        {**STRICT, "privacy": {"unit": "example", "max_epsilon": True}},
        "privacy.max_epsilon=True in {} is not valid",
        "privacy.max_epsilon",
    ),
    "a word": (
        {**BASE, "limits": {"max_local_steps": "many"}},
        "limits.max_local_steps='many' in {} is not valid",
        "limits.max_local_steps",
    ),
    "half a step": (
        {**BASE, "limits": {"max_local_steps": 1.5}},
        "limits.max_local_steps=1.5 in {} is not valid",
        "limits.max_local_steps",
    ),
    "no step": ({**BASE, "limits": {"max_local_steps": 0}}, "limits.max_local_steps=0 in {} is out of range", "limits.max_local_steps"),
    "not a number": ("client: a\ndata: {path: a.csv}\nlimits: {max_seconds: .inf}\n", "limits.max_seconds=", "limits.max_seconds"),
    "no class": ({**BASE, "data": {"path": "a.csv", "labels": ["x"]}}, "data.labels=('x',) in {} names no classes", "data.labels"),
    "two of one name": (
        {**BASE, "data": {"path": "a.csv", "labels": {"x": "u", "y": "u"}}},
        "data.labels={{'x': 'u', 'y': 'u'}} in {} names no classes",
        "data.labels",
    ),
    "a device": ({**BASE, "device": "tpu"}, "device='tpu' in {} is no device", "device"),
    "no such method": ({**BASE, "methods": ["fed_bs"]}, "methods in {}: unknown method 'fed_bs' (did you mean 'fed_sb'?)", "methods"),
    "no method": ({**BASE, "methods": []}, "methods=() in {} allows nothing", "methods"),
    "a model twice": ({**BASE, "models": [{"name": "x", "sha256": HASH}] * 2}, "models in {} names 'x' twice", "models"),
    "half a hash": ({**BASE, "models": [{"name": "x", "sha256": "ab"}]}, "models in {}: sha256='ab' of 'x' must be 64 digits", "models"),
    "no hash": ({**BASE, "models": [{"name": "x"}]}, "models in {}: 'x' has no sha256; `fedsb node check", "models"),
    "no such model": ({**BASE, "models": [{"name": "x", "sha256": HASH, "path": "gone"}]}, "models 'x' in {}: '", "models"),
    "no such data": ({**BASE, "data": {"path": "gone.csv"}}, "data.path in {}: '", "data.path"),
    "noise of no unit": (
        {**BASE, "privacy": {"min_noise": 1.0}},
        "privacy.min_noise in {} has no effect without privacy.unit; add privacy.unit",
        "privacy.min_noise",
    ),
    "a delta of no budget": (
        {**STRICT, "privacy": {"unit": "example", "max_delta": 1e-6}},
        "privacy.max_delta in {} has no effect without privacy.max_epsilon or privacy.max_epsilon_run",
        "privacy.max_delta",
    ),
    "a list": ("- a\n", "holds a list, and no keys", "file"),
    "nothing": ("", "holds no keys; it needs client: and data: at least", "file"),
    "a key twice": ("client: a\nclient: b\n", "can't be read as YAML (", "file"),
    "no YAML": ("client: [", "can't be read as YAML (", "file"),
    "no variable": ("client: ${oc.env:NO_SUCH_NAME}\ndata: {path: a.csv}\n", "can't be read as YAML (", "file"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_cannot_be_used_is_one_line_with_its_key(case: str, tmp_path: Path) -> None:
    content, line, key = MISTAKES[case]
    path = written(tmp_path, content)
    with pytest.raises(NodeConfigError) as raised:
        read_node({FILE: str(path)})
    said = str(raised.value).replace(f"{path} (did", f"{path}(did")
    assert line.format(path) in said
    assert "\n" not in said
    assert raised.value.key == key


def test_where_the_file_is(tmp_path: Path) -> None:
    path = written(tmp_path, {**BASE, "rank": 0})
    for config, line in {
        "node.yaml": "file='node.yaml' in --node-config must begin at the root",
        str(tmp_path / "gone.yaml"): "can't be read (no such file or directory); name the node's own file",
    }.items():
        with pytest.raises(NodeConfigError) as raised:
            read_node({FILE: config})
        assert line in str(raised.value)
        assert name_of({FILE: config}) == ""
    with pytest.raises(NodeConfigError, match="--node-config has rank beside file; write into that file"):
        read_node({FILE: str(path), "rank": 2})
    assert name_of({FILE: str(path)}) == "a"  # though its rank is none


def test_a_file_that_was_changed_is_read_again(tmp_path: Path) -> None:
    path = written(tmp_path, BASE)
    assert read_file(path).device is None
    written(tmp_path, {**BASE, "device": "cpu"})
    assert read_file(path).device == "cpu"
    (tmp_path / "a.csv").unlink()
    with pytest.raises(NodeConfigError, match="is not there"):
        read_file(path)


def by_shell(folder: Path) -> str:
    return subprocess.run(["bash", "-c", SHELL], cwd=folder, check=True, capture_output=True, text=True).stdout.split()[0]


def test_the_hash_of_a_model_is_what_a_shell_says(tmp_path: Path) -> None:
    model = tmp_path / "model"
    for name, text in {
        "b.txt": "b",
        "B é.txt": "B",
        "a/c": "c",
        ".git/x": "x",
        "__pycache__/y.pyc": "y",
        "a-b": "",
        ".hidden": "z",
    }.items():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(text)
    (model / "link").symlink_to("b.txt")
    found = content_hash(model)
    assert found == by_shell(model)
    (model / ".git/x").write_text("other")
    assert content_hash(model) == found
    model.rename(tmp_path / "moved")
    assert content_hash(tmp_path / "moved") == found
    (tmp_path / "moved/a/c").write_text("d")
    assert content_hash(tmp_path / "moved") == by_shell(tmp_path / "moved") != found
    file = tmp_path / "one.gguf"
    file.write_text("weights")
    assert content_hash(file) == subprocess.run(["sha256sum", file], check=True, capture_output=True, text=True).stdout.split()[0]


def test_a_hash_is_computed_once_while_its_files_stay_as_they_are(tmp_path: Path) -> None:
    model, kept = tmp_path / "model", tmp_path / "kept"
    model.mkdir()
    (model / "x").write_text("one")
    first = content_hash(model, kept)
    table = (kept / KEPT).read_text()
    (kept / KEPT).write_text(table.replace(first, HASH))
    assert content_hash(model, kept) == HASH  # it was not read again
    stat = (model / "x").stat()
    (model / "x").write_text("two")
    os.utime(model / "x", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # of the same size, and as old by its own words
    assert content_hash(model, kept) == by_shell(model) != first
    (kept / KEPT).write_text("{cut")
    assert content_hash(model, kept) == by_shell(model)


def test_what_has_no_hash_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "odd\nname").touch()
    with pytest.raises(UserError, match="whose name has a line feed"):
        content_hash(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no files"):
        content_hash(tmp_path / "empty")


def test_the_example_says_every_key_once_and_may_be_used_as_it_stands(tmp_path: Path) -> None:
    text = (DOCS / "node.yaml").read_text(encoding="utf-8")
    (tmp_path / "node.yaml").write_text(text, encoding="utf-8")
    for place in ("data/client-0.csv", "data/client-0-test.csv", "models/minilm/config.json", "keys/client-0", "keys/peers"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    node = read_file(tmp_path / "node.yaml")
    said = {key: value for key, value in leaves(node) if value is not None}
    assert said.keys() == VALUES.keys() - {"data.test_fraction"}  # which stands for test_path, in a comment
    assert "# test_fraction: 0.1" in text
    [model] = node.models or ()
    assert None not in (model.name, model.sha256, model.path)
    bare = [line for line in text.splitlines() if line.strip() and "#" not in line and not line.rstrip().endswith(":")]
    assert [line.split()[0] for line in bare] == ["cardiology:", "oncology:", "sha256:"]


def test_the_documented_way_to_compute_a_hash_is_the_tested_one() -> None:
    assert SHELL in (DOCS / "federation.md").read_text(encoding="utf-8")
