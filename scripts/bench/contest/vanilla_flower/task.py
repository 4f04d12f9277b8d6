"""Model and data of the app."""

from __future__ import annotations

import json
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification


def load_work(context: Context) -> dict[str, Any]:
    """Return the workload that the run configuration names; a process keeps it, as apps keep their data."""
    return _read(shlex.split(str(context.run_config["overrides"]))[0])


@cache
def _read(path: str) -> dict[str, Any]:
    work: dict[str, Any] = json.loads(Path(path).read_text())
    return work


def load_model(work: dict[str, Any]) -> Any:
    """Load the pretrained model and put LoRA on it."""
    settings = work["settings"]
    base = AutoModelForSequenceClassification.from_pretrained(settings["model"], num_labels=settings["labels"])
    lora = LoraConfig(r=settings["rank"], lora_alpha=settings["alpha"], target_modules=settings["modules"])
    model = get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if "classifier" in name:
            parameter.requires_grad_(True)
    return model


def trained(model: Any) -> dict[str, Tensor]:
    """Return what is trained, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def collate(examples: list[dict[str, Any]]) -> tuple[dict[str, Tensor], Tensor]:
    """Pad to the longest."""
    longest = max(len(e["input_ids"]) for e in examples)
    rows = [e["input_ids"] + [0] * (longest - len(e["input_ids"])) for e in examples]
    mask = [[1] * len(e["input_ids"]) + [0] * (longest - len(e["input_ids"])) for e in examples]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}, torch.tensor([e["target"] for e in examples])
