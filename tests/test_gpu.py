"""The same round on a CPU and on a GPU, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.strategies.federations import classification, federate
from tests.strategies.private_runs import EXAMPLE, run_privately, small

METHODS = {
    "fed_sb": ["method=fed_sb", "init.kind=orthogonal"],
    "fedavg_lora": ["method=fedavg_lora"],
    "fedex_lora": ["method=fedex_lora"],
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("method", METHODS)
def test_a_round_on_a_gpu_is_that_of_the_cpu(
    method: str, tiny_bert: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to rounding; plain SGD, since Adam's first steps are the signs of gradients, however small."""
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path))
    plain = ["train.optimizer=sgd", "train.lr=0.1", "federation.num_rounds=2", "adapter.alpha=5"]
    overrides = [*METHODS[method], *classification(tiny_bert, tiny_csv), *plain]
    on_cpu, on_gpu = (federate([*overrides, f"device={device}"]) for device in ("cpu", "cuda"))
    for before, after in zip(on_cpu.kept.states, on_gpu.kept.states, strict=True):
        for name, t in before.items():
            assert float((after[name] - t).norm()) <= 1e-4 * max(1e-3, float(t.norm())), name
    for before, after in zip(on_cpu.records, on_gpu.records, strict=True):
        assert after.metrics["loss"] == pytest.approx(before.metrics["loss"], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("method", METHODS)
def test_private_training_passes_its_self_checks_on_a_gpu(
    method: str, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise is drawn on the GPU, so the bits are others than the CPU's; what is charged is the same."""
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path))
    on_cpu, on_gpu = (
        run_privately([*small(tiny_bert, tmp_path, *EXAMPLE), *METHODS[method], f"device={device}"], tmp_path / device)
        for device in ("cpu", "cuda")
    )
    assert on_gpu.error is None
    assert on_gpu.records[-1].epsilon == on_cpu.records[-1].epsilon
    assert not on_gpu.records[-1].failed
