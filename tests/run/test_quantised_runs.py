"""A whole run over a base in 8 or 4 bits: it is taken up to the same bits, and exported as what it computed with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedsb.app.exports.on_request import export
from fedsb.app.finished import left_of
from fedsb.models.build import build_model
from fedsb.run.folder import read_run
from fedsb.tasks.task import TASKS
from tests.models.test_quantise import lacks
from tests.run.mortal import Killed, Run

TOKENS = torch.arange(14).view(2, 7) + 5


@pytest.mark.parametrize(("kind", "method"), [("int8", "fed_sb"), ("int4", "rolora"), ("nf4", "fedex_lora")])
def test_it_is_taken_up_to_the_same_bits_and_exported_as_it_computed(
    kind: str, method: str, run: Run, tiny_llama: Path, tmp_path: Path
) -> None:
    if lacks(kind):
        pytest.skip("its package is not installed")
    start = ("init.kind=weight_svd",) if method == "fed_sb" else ()
    base = (f"method={method}", f"model.name='{tiny_llama}'", "data.task=causal_lm", "data.label=null", *start)
    narrow = (*base, f"model.quantize={kind}")
    whole, folder = run(tmp_path / "whole", *narrow), tmp_path / "killed"
    with pytest.raises(Killed):
        run(folder, *narrow, life=9)
    again = run(folder, f"resume={folder}")
    assert {key for key in whole if again[key] != whole[key]} <= {"wall_s", "cpu_s"}
    assert whole["factors_sha256"] != run(tmp_path / "plain", *base)["factors_sha256"]
    assert max(gap for record in read_run(folder).records if (gap := record.exactness_gap) is not None) < 1e-5
    left = left_of(folder, "export")
    c = left.config
    ours = build_model(c.model, c.adapter, family=c.method.adapter, task=TASKS["causal_lm"], labels=(), seed=0, hold=c.frozen.hold)
    ours.install(left.snapshot.state, left.snapshot.frozen.view())
    with torch.no_grad():
        wanted = ours.model.eval()(input_ids=TOKENS).logits
        merged = AutoModelForCausalLM.from_pretrained(export(folder)[0]).eval()
        assert torch.allclose(merged(input_ids=TOKENS).logits, wanted, atol=1e-5)
    _, remarks = export(folder, tmp_path / "peft", form="peft")
    assert [kind in remark and "--format merged" in remark for remark in remarks] == [True]
