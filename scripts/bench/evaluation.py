"""Peak memory and CPU time of evaluating a language model with a wide vocabulary; prints one line.

Run as ``python scripts/bench/evaluation.py [rows] [tokens] [overrides…]`` on an installed project, a process a measurement. The model
is made up (one Llama layer of width 64 over 49,152 words), so that nearly all of its memory is its outputs.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedsb.config.compose import load
from fedsb.config.schema import Config
from fedsb.models.adapted import AdaptedModel
from fedsb.models.build import build_model
from fedsb.models.evaluate import evaluate
from fedsb.tasks.task import TASKS

WORDS = 49_152


def main() -> None:
    """Evaluate made-up rows and say what it took."""
    rows, tokens = (int(value) for value in (sys.argv[1:3] or ("40", "128")))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config, adapted = made(Path(folder), sys.argv[3:])
    generator = torch.Generator().manual_seed(0)
    features = [{"input_ids": torch.randint(WORDS, (tokens,), generator=generator).tolist()} for _ in range(rows)]
    before, begun = peak_mib(), time.process_time()
    loss = evaluate(adapted, TASKS["causal_lm"], features, train=config.train)["loss"]
    copy = rows * tokens * WORDS * 4 / 2**20
    print(
        f"{rows} x {tokens} tokens: loss {loss:.6f}, {peak_mib() - before:,.0f} MiB at most (all outputs are {copy:,.0f}), "
        f"{time.process_time() - begun:.1f} s of CPU"
    )


def made(folder: Path, more: list[str]) -> tuple[Config, AdaptedModel]:
    """Make a model and a tokeniser of one word."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, max_position_embeddings=4096, **sizes)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"</s>": 0, "word": 1}, "</s>")), eos_token="</s>").save_pretrained(folder)
    config = load(["model=pretrained", f"model.name='{folder}'", "rank=2", "data.task=causal_lm", *more])
    return config, build_model(config.model, config.adapter, family="lora_sb", task=TASKS["causal_lm"], labels=(), seed=0)


def peak_mib() -> float:
    """Return the most memory that this process has held, in MiB (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
