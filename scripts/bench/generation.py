"""Tokens a second of generation in batches against one prompt at a time; prints a table.

Run as ``python scripts/bench/generation.py [prompts] [new tokens] [overrides…]`` on an installed project with the extra ``llm``: the
untouched SmolLM2 on questions of reasoning-gym, on one thread. Both ways generate the same number of tokens (no response ends before its
limit), take turns, and are told by CPU time; the figure is the median of the turns.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from fedsb.app.assembly import task_of, tokenizer_of
from fedsb.app.measuring.scoring import measured_prompts
from fedsb.config.compose import load
from fedsb.models.build import plain_model
from fedsb.tasks.generation import Decoding, generate

BATCH, TURNS = 16, 3


def main() -> None:
    """Generate both ways in turn, and say how fast each was."""
    count, new = (int(value) for value in (sys.argv[1:3] or ("16", "32")))
    torch.set_num_threads(1)
    config = load(["model=smollm2", "data=reasoning_gym", "data.tasks=[chain_sum,gcd]", f"eval.max_examples={count}", *sys.argv[3:]])
    adapted = plain_model(config.model, task=task_of(config), labels=(), seed=0, device="cpu")
    prompts, tokenizer = [prompt.ids for prompt in measured_prompts(config)], tokenizer_of(config)
    lengths = sorted(map(len, prompts))
    print(f"{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens, {new} new tokens each, {torch.get_num_threads()} thread")
    rates: dict[int, list[float]] = {1: [], BATCH: []}
    said = {}
    for _ in range(TURNS):
        for most, found in rates.items():
            begun = time.process_time()
            said[most] = generate(adapted.model, tokenizer, prompts, Decoding(new), ends=[], most=most, tokens=10**6)
            found.append(len(prompts) * new / (time.process_time() - begun))
    one, many = (statistics.median(found) for found in rates.values())
    alike = sum(a == b for a, b in zip(*said.values(), strict=True))
    print(f"one by one {one:.1f} tokens a second of CPU, {BATCH} at a time {many:.1f}: {many / one:.2f}x; {alike} of {len(prompts)} alike")


if __name__ == "__main__":
    main()
