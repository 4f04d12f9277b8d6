"""A run that is ended at any moment and taken up again ends with the bits and the bytes of one that was left alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fedsb.app import outcome
from fedsb.core.rng import numpy_generator
from fedsb.report.report import write_report
from fedsb.run.folder import read_run
from fedsb.run.predictions import FILE
from fedsb.run.records import RoundRecord
from tests.run.mortal import RUNS, Killed, Run
from tests.strategies.private_runs import small


def told(folder: Path) -> list[RoundRecord]:
    """Return a run's records without its times."""
    return [replace(record, wall_s=0.0, cpu_s=0.0) for record in read_run(folder).records]


def predicted(folder: Path) -> bytes | None:
    return (folder / FILE).read_bytes() if (folder / FILE).exists() else None


@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_at_any_reply_ends_like_one_that_was_not(name: str, run: Run, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", *RUNS[name])
    draw, folder = numpy_generator(0, "kill", name), tmp_path / "killed"
    with pytest.raises(Killed):
        run(folder, *RUNS[name], life=int(draw.integers(2, 12)), after=bool(draw.integers(2)))
    with pytest.raises(Killed):
        run(folder, f"resume={folder}", life=int(draw.integers(2)), after=bool(draw.integers(2)))
    again = run(folder, f"resume={folder}")
    assert again["factors_sha256"] == whole["factors_sha256"]
    assert told(folder) == told(tmp_path / "whole")
    assert predicted(folder) == predicted(tmp_path / "whole")
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == len(told(folder)) >= 4
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


SECURE = ("init.kind=weight_svd", "federation.secure_sum=true", "federation.exactness=false")


@pytest.mark.parametrize(("more", "life"), [(("method=fedask",), 4), (("method=fedask",), 6), (("method=fedask",), 13), (SECURE, 38)])
def test_a_run_killed_between_the_exchanges_of_a_round_trains_it_again(more: tuple[str, ...], life: int, run: Run, tmp_path: Path) -> None:
    """Four first replies, then four second ones, in each round; in secure sums five times four, and two have unmasked the second one."""
    given, folder = (*more, "runtime.stack=1"), tmp_path / "killed"
    whole = run(tmp_path / "whole", *given)
    with pytest.raises(Killed):
        run(folder, *given, life=life)
    again = run(folder, f"resume={folder}")
    assert {key for key in whole if again[key] != whole[key]} <= {"wall_s", "cpu_s"}
    assert told(folder) == told(tmp_path / "whole")


def test_a_stack_goes_on_as_a_stack(run: Run, tmp_path: Path) -> None:
    """Side by side other bits come out than one after the other: a resumed run must not change over."""
    more = ("method=fedavg_lora", "adapter.dropout=0.1", "runtime.stack=3")
    whole, folder = run(tmp_path / "whole", *more), tmp_path / "killed"
    alone = run(tmp_path / "alone", *more[:-1])
    assert whole["factors_sha256"] != alone["factors_sha256"]
    with pytest.raises(Killed):
        run(folder, *more, life=3)
    assert run(folder, f"resume={folder}")["factors_sha256"] == whole["factors_sha256"]


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
