"""Models in GGUF files: laid out once, whole, with the file's own weights and the splitting that its tokenizer was made for."""

from __future__ import annotations

import json
import resource
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fedsb.config.compose import load
from fedsb.config.schema import ModelConfig
from fedsb.core.errors import UserError
from fedsb.models import gguf as ours
from fedsb.models.gguf import unpacked
from fedsb.models.heads import remarks_on
from fedsb.models.loading import load_network, load_tokenizer, locate
from fedsb.tasks.task import TASKS
from tests.strategies.federations import federate

pytestmark = pytest.mark.skipif(find_spec("gguf") is None, reason="gguf is not installed (extra `llm`)")
HEADS, GROUPS, WIDTH, LAYERS, CONTEXT = 4, 2, 64, 2, 256
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["1 2", "Ġ Ġ", "h i"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def in_halves(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Bring the rows of each head into the order in which llama.cpp turns them: pairs of neighbours, not of halves."""
    size = len(weight) // heads
    order = [head * size + part * (size // 2) + row for head in range(heads) for row in range(size // 2) for part in range(2)]
    return weight[order]


def written(path: Path) -> LlamaForCausalLM:
    """Write a random tied Llama with grouped-query attention as GGUF, and return one with the weights that its rounding has left."""
    from gguf import GGMLQuantizationType as Kind
    from gguf import GGUFWriter, dequantize, quantize

    tokens = [*SPECIALS, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = LlamaConfig(
            vocab_size=len(tokens),
            hidden_size=WIDTH,
            intermediate_size=96,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=GROUPS,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
        )
        network = LlamaForCausalLM(config).eval()
    file = GGUFWriter(path, "llama")
    file.add_name("tiny")
    for name, value in {
        "block_count": LAYERS,
        "context_length": CONTEXT,
        "embedding_length": WIDTH,
        "feed_forward_length": 96,
        "head_count": HEADS,
        "head_count_kv": GROUPS,
        "rope_freq_base": 10000.0,
        "layer_norm_rms_eps": 1e-6,
        "vocab_size": len(tokens),
        "rope_dimension_count": WIDTH // HEADS,
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "smollm",
        "token_list": tokens,
        "token_types": [3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS)),
        "token_merges": MERGES,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unk_token_id": 0,
        "pad_token_id": 2,
        "add_bos_token": False,
        "chat_template": TEMPLATE,
    }.items():
        getattr(file, f"add_{name}")(value)
    parts = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate"}
    parts |= {"up_proj": "ffn_up", "down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for name, parameter in network.named_parameters():
        words = name.split(".")
        called = whole.get(name) or f"blk.{words[2]}.{parts[words[-2]]}.weight"
        weight = parameter.detach().numpy()
        kind = Kind.F32 if weight.ndim == 1 else Kind.Q8_0 if name in whole else Kind.Q4_1
        turned = {"q_proj": HEADS, "k_proj": GROUPS}.get(words[-2])
        rounded = quantize(in_halves(weight, turned) if turned else weight, kind)
        file.add_tensor(called, rounded, raw_dtype=kind)
        parameter.data = torch.from_numpy(dequantize(quantize(weight, kind), kind).reshape(weight.shape).copy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return network


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, written(path)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def laid_out(tiny: tuple[Path, LlamaForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSB_HOME", str(tmp_path_factory.mktemp("laid") / "home"))
        return unpacked(tiny[0])


def named(path: Path) -> ModelConfig:
    return replace(load(["model=pretrained", "model.name=x"]).model, name=str(path))


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


def test_the_folder_holds_the_files_weights_and_their_geometry(tiny: tuple[Path, LlamaForCausalLM], laid_out: Path) -> None:
    network: Any = load_network(named(laid_out), TASKS["causal_lm"], (), 0, "cpu")
    tokens = torch.randint(0, network.config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(network(input_ids=tokens).logits, tiny[1](input_ids=tokens).logits, rtol=1e-5, atol=1e-5)
    assert {name: p.dtype for name, p in network.named_parameters()} == dict.fromkeys(dict(tiny[1].named_parameters()), torch.float32)
    for name, parameter in tiny[1].named_parameters():
        assert torch.equal(network.get_parameter(name), parameter), name
    assert network.lm_head.weight is network.model.embed_tokens.weight
    assert (network.config.num_key_value_heads, network.config.max_position_embeddings) == (GROUPS, CONTEXT)


def test_the_rounding_of_the_weights_is_said(laid_out: Path, tiny_llama: Path) -> None:
    said = " ".join(remarks_on(load_network(named(laid_out), TASKS["causal_lm"], (), 0, "cpu")))
    assert "were rounded in the file they come from (Q4_1 7" in said
    assert "Q8_0 2" in said
    assert not remarks_on(load_network(named(tiny_llama), TASKS["causal_lm"], (), 0, "cpu"))


def test_the_tokenizer_splits_as_its_merges_were_learnt_and_gives_texts_back(laid_out: Path) -> None:
    tokenizer = load_tokenizer(named(laid_out))
    assert tokenizer is not None
    assert tokenizer.convert_ids_to_tokens(tokenizer("hi  12").input_ids) == ["hi", "ĠĠ", "1", "2"]
    assert [tokenizer(special).input_ids for special in SPECIALS] == [[0], [1], [2]]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (*SPECIALS[1:], SPECIALS[2], SPECIALS[0])
    assert tokenizer.model_max_length == CONTEXT
    talk = tokenizer.apply_chat_template([{"role": "user", "content": "hi 12"}], tokenize=False)
    assert talk == "<|im_start|>user\nhi 12<|im_end|>\n"
    for text in (talk, "", " a ,b's\n\n1 000,5", "漢字 🙂\u2028é", "  \t12hi"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_its_weights_are_plain_to_whoever_loads_it(laid_out: Path) -> None:
    """A private run refuses a folder that says otherwise."""
    assert "quantization_config" not in json.loads((laid_out / "config.json").read_text(encoding="utf-8"))


def test_generation_ends_where_an_answer_does(laid_out: Path) -> None:
    said = json.loads((laid_out / "generation_config.json").read_text(encoding="utf-8"))
    assert {key: said[f"{key}_token_id"] for key in ("bos", "eos", "pad")} == {"bos": 1, "eos": 2, "pad": 2}


def test_it_is_made_once_by_whoever_comes_first(tiny: tuple[Path, LlamaForCausalLM], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, read = [], ours._read
    monkeypatch.setattr(ours, "_read", lambda file: made.append(file) or read(file))
    with ThreadPoolExecutor(4) as pool:
        folders = {*pool.map(lambda _: locate(named(tiny[0])), range(4))}
    assert len(folders) == len(made) == 1
    folder = Path(folders.pop())
    assert folder.parent == home / "models"
    assert files_in(home / "models") == {folder.name, f"{folder.name}.lock", *(path.name for path in folder.iterdir())}
    AutoTokenizer.from_pretrained(folder)


def test_what_was_cut_off_is_made_anew_and_what_a_killed_one_left_goes(tiny: tuple[Path, LlamaForCausalLM], home: Path) -> None:
    folder = unpacked(tiny[0])
    (folder / "model.safetensors").unlink()
    left = folder.parent / f".{folder.name}.0123.part"
    left.mkdir()
    assert unpacked(tiny[0]) == folder
    assert (folder / "model.safetensors").is_file()
    assert not left.exists()


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tiny: tuple[Path, LlamaForCausalLM], home: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(
            UserError, match=r"^the model can't be unpacked into .* \(file too large.*make room, or set FEDSB_HOME"
        ) as caught:
            unpacked(tiny[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert all(name.endswith(".lock") for name in files_in(home / "models"))
    assert unpacked(tiny[0]).is_dir()


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize("damage", [cut, lambda content: content[:40], lambda content: b"no such thing", lambda content: b""])
def test_a_file_that_cannot_be_read_is_one_line(damage: Any, tiny: tuple[Path, LlamaForCausalLM], home: Path, tmp_path: Path) -> None:
    file = tmp_path / "torn.gguf"
    file.write_bytes(damage(tiny[0].read_bytes()))
    with pytest.raises(
        UserError, match=r"torn.gguf' can't be read as a GGUF model \(.+\); get the file again, or name another model$"
    ) as caught:
        load_network(named(file), TASKS["causal_lm"], (), 0, "cpu")
    assert "\n" not in str(caught.value)
    assert all(name.endswith(".lock") for name in files_in(home / "models"))


def test_a_file_that_is_not_there_is_one_line(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        locate(named(tmp_path / "none.gguf"))
    with pytest.raises(UserError, match=r"'none.gguf' is no file; give a .gguf file"):
        locate(named(Path("none.gguf")))


def test_a_missing_package_is_one_line(tiny: tuple[Path, LlamaForCausalLM], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"the package gguf, which is not installed: pip install 'fedsb\[llm\]'$"):
        unpacked(tiny[0])
    absent = replace(load(["model=smollm2"]).model, name="llm-no-such")
    with pytest.raises(UserError, match=r"the package 'llm-no-such' is not installed: pip install llm-no-such$"):
        locate(absent)


def test_no_global_generator_is_moved(tiny: tuple[Path, LlamaForCausalLM], home: Path) -> None:
    before = torch.get_rng_state()
    unpacked(tiny[0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")
@pytest.mark.parametrize("method", ["fed_sb", "fedavg_lora", "fedex_lora"])
def test_it_is_trained_in_a_federation_of_tasks(method: str, tiny: tuple[Path, LlamaForCausalLM], home: Path) -> None:
    """Grouped-query attention and tied embeddings under adapters, one task a client; the exact methods stay exact."""
    gym = ["data=reasoning_gym", "data.tasks=[gcd,lcm]", "data.task_rows=8", "data.task_test_rows=4", "train.max_length=256"]
    owners = ["federation.partition.kind=natural", "federation.partition.column=task", "federation.num_rounds=2", "federation.wait=0"]
    steps = ["train.local_steps=2", "train.batch_size=4", "rank=2", "device=cpu", "plots=false"]
    run = federate([f"method={method}", "model=pretrained", f"model.name='{tiny[0]}'", *gym, *owners, *steps])
    assert run.config.federation.num_clients == len(run.grid.rounds()[1]) == 2
    adapted = run.prepared.adapted
    assert any("rounded" in remark for remark in adapted.remarks)
    assert len(adapted.shapes) == 7 * LAYERS
    assert adapted.shapes["model.layers.0.self_attn.k_proj"] == (WIDTH * GROUPS // HEADS, WIDTH)
    losses = [record.metrics["loss"] for record in run.records if record.metrics]
    assert losses[-1] < losses[0]
    assert (run.records[-1].exactness_gap < 1e-5) is (method != "fedavg_lora")
