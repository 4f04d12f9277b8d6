"""Weights are read into place: a model is in memory once while it is loaded, whatever dtype its files have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conftest import decoder_tokenizer

pytestmark = pytest.mark.slow
# A process of its own, whose peak is that of loading: memory of this process, and files that it maps.
SCRIPT = """
import json, sys, threading, time
from fedsb.config.compose import load
from fedsb.models.loading import load_network
from fedsb.tasks.task import TASKS

def now():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return [1024 * int(lines[key].split()[0]) for key in ("RssAnon", "RssFile")]

folder, dtype = sys.argv[1:]
model = load(["model=pretrained", f"model.name='{folder}'", f"model.dtype={dtype}", "data.task=causal_lm"]).model
before, seen, over = now(), [], threading.Event()

def watch():
    while not over.is_set():
        seen.append(now())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
network = load_network(model, TASKS["causal_lm"], (), 0, "cpu")
total = sum(float(p.sum(dtype=p.dtype)) for p in network.parameters())  # all of it is read
over.set()
watcher.join()
own = sum(p.nbytes for p in network.parameters())
anonymous, whole = max(s[0] for s in seen) - before[0], max(sum(s) for s in seen) - sum(before)
print(json.dumps({"own": own, "anonymous": anonymous / own, "whole": whole / own}))
"""


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A folder of several shards, about 120 MB of weights in bfloat16."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 2}
    folder = tmp_path_factory.mktemp("shards")
    with torch.random.fork_rng():
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(decoder_tokenizer()), **sizes)).to(getattr(torch, request.param))
    model.save_pretrained(folder, max_shard_size="60MB")
    decoder_tokenizer().save_pretrained(folder)
    return request.param, folder


def test_loading_takes_the_bytes_of_the_model_and_no_copy_in_another_dtype(saved: tuple[str, Path]) -> None:
    """What is mapped from files of another dtype is not held: the system takes it back when it wants to."""
    kind, folder = saved
    command = [sys.executable, "-c", SCRIPT, str(folder), "bfloat16"]
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ}).stdout.splitlines()[-1])
    assert told["own"] > 1e8
    assert told["anonymous"] <= 1.15
    if kind == "bfloat16":
        assert told["whole"] <= 1.15
