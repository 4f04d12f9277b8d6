"""A run goes on with the configuration that it was begun with, and what a resumed one may change is little."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedsb.cli import main
from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.run.folder import RunFolder
from fedsb.run.resuming import for_nodes, resumed, sealed
from tests.run.mortal import Run
from tests.strategies.private_runs import small


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
