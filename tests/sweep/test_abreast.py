"""How many jobs run side by side is what the least of CPUs, GPUs and memory allows; a number that is asked for is taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.sweep import abreast as here
from fedsb.sweep.abreast import BARE, COPIES, abreast, job_bytes


@pytest.mark.parametrize(
    ("cores", "gib", "cards", "threads", "device", "found"),
    [
        (8, 100, 0, 1, "auto", 8),
        (8, 100, 0, 3, "auto", 2),
        (8, 3.5, 0, 1, "auto", 3),
        (8, 0.1, 0, 1, "auto", 1),
        (8, 100, 2, 1, "auto", 2),
        (8, 100, 2, 1, "cpu", 8),
        (64, 1000, 0, 1, "auto", 20),
    ],
)
def test_the_least_of_them_counts(
    monkeypatch: pytest.MonkeyPatch, cores: int, gib: float, cards: int, threads: int, device: str, found: int
) -> None:
    monkeypatch.setattr(here, "cores", lambda: cores)
    monkeypatch.setattr(here, "available_bytes", lambda: int(gib * 2**30))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    made = load(["model.kind=config", f"device={device}", f"runtime.threads={threads}"])
    jobs = [made] * 20
    assert abreast("auto", jobs) == (found, cards if device != "cpu" else 0)
    assert abreast(5, jobs)[0] == 5
    assert abreast(50, jobs)[0] == 20
    assert abreast(1, jobs)[0] == 1


def test_rays_workers_take_the_machine() -> None:
    config = load(["runtime=ray"])
    assert abreast("auto", [config] * 3) == (1, 0)
    with pytest.raises(UserError, match=r"sweep\.jobs=2 with runtime=ray"):
        abreast(2, [config])


def test_a_job_is_as_large_as_its_models_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"0" * 1000)
    (tmp_path / "config.json").write_text("{}")
    model = load(["model=pretrained", f"model.name={tmp_path}"]).model
    assert job_bytes(model) == BARE + COPIES * 1000
    assert job_bytes(replace(model, name="/nowhere")) == job_bytes(replace(model, name="some/hub-id")) == BARE
