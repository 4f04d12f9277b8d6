"""Opponent: a hand-written federated loop over one PEFT model; with ``--private`` by Opacus. Needs torch, transformers, peft, opacus.

Says ``ready``, then does a round for each line that it reads and says ``done``. The workload names examples, batches and settings.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class PeftLoop:
    """FedAvg over clients that take turns with one model.

    Args:
        work: the workload.
        private: train by DP-SGD.
    """

    def __init__(self, work: dict[str, Any], private: bool) -> None:
        self.work, self.private = work, private
        self.model = peft_model(work)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.server = [p.detach().clone() for p in self.parameters]
        if private:
            from opacus.grad_sample import GradSampleModule

            self.model = GradSampleModule(self.model, batch_first=True, loss_reduction="mean")

    def round(self, number: int) -> None:
        """Train every client from the server's tensors, and average."""
        sums, weight = [torch.zeros_like(t) for t in self.server], 0
        for client, plan in self.work["rounds"][number].items():
            with torch.no_grad():
                for parameter, value in zip(self.parameters, self.server, strict=True):
                    parameter.copy_(value)
            shard = self.work["clients"][client]
            self.train([[shard[i] for i in indices] for indices in plan], len(shard))
            for held, parameter in zip(sums, self.parameters, strict=True):
                held.add_(parameter.detach(), alpha=len(shard))
            weight += len(shard)
        self.server = [t / weight for t in sums]

    def train(self, batches: Sequence[Sequence[dict[str, Any]]], examples: int) -> None:
        """Take one step a batch."""
        settings = self.work["settings"]
        optimizer: Any = torch.optim.AdamW(self.parameters, lr=settings["lr"])
        if self.private:
            from opacus.optimizers import DPOptimizer

            rate = settings["batch"] / examples
            optimizer = DPOptimizer(optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=rate * examples)
        self.model.train()
        for examples_ in batches:
            batch, targets = collate(examples_)
            optimizer.zero_grad()
            F.cross_entropy(self.model(**batch).logits, targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def peft_model(work: dict[str, Any]) -> Any:
    """Return the model with LoRA on the workload's layers, its head trained too."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    settings = work["settings"]
    base = AutoModelForSequenceClassification.from_pretrained(settings["model"], num_labels=settings["labels"])
    lora = LoraConfig(r=settings["rank"], lora_alpha=settings["alpha"], target_modules=settings["modules"])
    model = get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if "classifier" in name:
            parameter.requires_grad_(True)
    return model


def collate(examples: Sequence[dict[str, Any]]) -> tuple[dict[str, Tensor], Tensor]:
    """Pad to the longest."""
    longest = max(len(e["input_ids"]) for e in examples)
    rows = [e["input_ids"] + [0] * (longest - len(e["input_ids"])) for e in examples]
    mask = [[1] * len(e["input_ids"]) + [0] * (longest - len(e["input_ids"])) for e in examples]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}, torch.tensor([e["target"] for e in examples])


def commands() -> Iterator[int]:
    """Say that all is ready, and yield the number of each round that is asked for."""
    print("ready", flush=True)
    for number, _ in enumerate(sys.stdin):
        yield number
        print("done", flush=True)


def main() -> None:
    """Do rounds as they are asked for."""
    torch.set_num_threads(1)
    loop = PeftLoop(json.loads(Path(sys.argv[1]).read_text()), "--private" in sys.argv)
    for number in commands():
        loop.round(number)


if __name__ == "__main__":
    main()
