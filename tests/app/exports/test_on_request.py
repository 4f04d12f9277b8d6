"""An exported model is the run's own, in whatever format, and its card says what it is and tells nothing about the clients' machines."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsb.app.exports.formats import FORMATS
from fedsb.app.exports.on_request import export, merged_for
from fedsb.app.finished import left_of
from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.models.build import build_model
from fedsb.tasks.task import TASKS
from tests.app.runs import federated

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
TOKENS = torch.arange(14).view(2, 7) + 5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, asked: list[str]) -> Path:
    """A run whose frozen weights have grown beside a base in bfloat16."""
    folder = tmp_path_factory.mktemp("grown") / "run"
    quick = ["method=fedex_lora", "model.dtype=bfloat16", "eval.scores=[]", "train.local_epochs=1", "train.lr=0.0001"]
    federated(folder, [*asked, *quick, "model.head=none"])
    return folder


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    return found.double()


def wide(folder: Path) -> Tensor:
    """Return the logits of the run's own model on its base in float32."""
    left = left_of(folder, "export")
    c = left.config
    adapted = build_model(c.model, c.adapter, family=c.method.adapter, task=TASKS["causal_lm"], labels=(), seed=0, hold="factors")
    adapted.install(left.snapshot.state, left.snapshot.frozen.view())
    return logits(adapted.model.float())


def test_merged_in_float32_it_says_what_the_run_s_model_says(run: Path, tmp_path: Path) -> None:
    out, remarks = export(run, tmp_path / "out", dtype="float32")
    assert remarks == []
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float32
    assert torch.allclose(logits(model), wide(run), atol=1e-5)
    assert model.config.use_cache is True
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(out).eos_token_id


def test_merged_in_bfloat16_it_says_how_much_of_what_was_learnt_is_rounded_away(run: Path, tmp_path: Path) -> None:
    out, remarks = export(run, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(out)
    base = AutoModelForCausalLM.from_pretrained(left_of(run, "export").config.model.name)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    exact = AutoModelForCausalLM.from_pretrained(export(run, tmp_path / "exact", dtype="fp32")[0])
    lost = whole = 0.0
    for name, weight in exact.state_dict().items():
        start = base.state_dict()[name].bfloat16().double()
        change = weight.double() - start
        lost += float((merged.state_dict()[name].double() - start - change).square().sum())
        whole += float(change.square().sum())
    (said,) = remarks
    assert f"{(lost / whole) ** 0.5:.1%}" in said
    assert "--dtype float32" in said
    assert said in (out / "README.md").read_text()


def test_peft_loads_it_over_the_base_to_the_same_logits(run: Path, tmp_path: Path) -> None:
    out, _ = export(run, tmp_path / "out", form="peft")
    base = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    narrow = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    assert torch.allclose(logits(PeftModel.from_pretrained(narrow.float(), str(out))), wide(run), atol=1e-5)


@pytest.mark.skipif(find_spec("gguf") is None, reason="gguf is not installed")
def test_ready_for_gguf_every_tensor_has_a_place_and_the_chat_template_is_where_any_converter_looks(run: Path, tmp_path: Path) -> None:
    from gguf import MODEL_ARCH, get_tensor_name_map

    out, _ = export(run, tmp_path / "out", form="gguf-ready", dtype="fp16")
    places = get_tensor_name_map(MODEL_ARCH.LLAMA, 2)
    tensors = load_file(out / "model.safetensors")
    assert all(places.get_name(name, (".weight",)) for name in tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    template = AutoTokenizer.from_pretrained(out).chat_template
    assert json.loads((out / "tokenizer_config.json").read_text()).get("chat_template") == template
    assert (out / "tokenizer.json").is_file()


def test_the_card_tells_method_bytes_claim_and_base_and_no_path_and_no_client(run: Path, tmp_path: Path) -> None:
    out, _ = export(run, tmp_path / "out")
    text = (out / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    summary = json.loads((run / "summary.json").read_text())
    assert front["library_name"] == "transformers"
    assert "license" not in front
    assert front["tags"][-1] == "fedex_lora"
    for told in (f"{summary['payload_total']:,}", "epsilon is not claimed", summary["factors_sha256"], f"{summary['exactness_gap']:.1e}"):
        assert told in text
    assert "base_model" not in front  # a folder of this machine is on no hub
    assert "client-0" not in text
    assert str(tmp_path.parent) not in text


def test_the_licence_is_that_which_the_base_s_card_names(run: Path, tmp_path: Path, tiny_llama: Path) -> None:
    card = tiny_llama / "README.md"
    card.write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# A base\n")
    try:
        out, _ = export(run, tmp_path / "out", form="peft")
    finally:
        card.unlink()
    assert yaml.safe_load((out / "README.md").read_text().split("---")[1])["license"] == "apache-2.0"


@pytest.mark.parametrize(
    ("asked_for", "said"),
    [
        ({"form": "onnx"}, "unknown format 'onnx'"),
        ({"dtype": "int3"}, "unknown dtype 'int3'"),
        ({"form": "peft", "dtype": "bf16"}, "--dtype bfloat16 is for merged weights"),
    ],
)
def test_what_no_format_can_do_is_refused_in_a_line_and_nothing_is_written(
    run: Path, tmp_path: Path, asked_for: dict[str, str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        export(run, tmp_path / "out", **asked_for)
    assert not (tmp_path / "out").exists()


def test_a_run_that_has_not_finished_is_refused_and_lm_eval_may_have_it(run: Path, tmp_path: Path) -> None:
    summary = run / "summary.json"
    text = summary.read_text()
    summary.unlink()
    try:
        with pytest.raises(UserError, match=r"has not finished \(round 2\).*fedsb run resume="):
            export(run, tmp_path / "out")
        assert AutoModelForCausalLM.from_pretrained(merged_for(run, tmp_path / "far")) is not None
    finally:
        summary.write_text(text)


@pytest.mark.parametrize(("form", "method", "said"), [("gguf-ready", "fed_sb", "has a head"), ("peft", "head_only", "trains no adapter")])
def test_what_does_not_suit_a_run_is_told_before_its_model_is_loaded(form: str, method: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        FORMATS[form].check(load([f"method={method}"]), None)
