"""The usual ClientApp: load the model for each message, put the server's arrays in, train, send the arrays back."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.nn import functional as F
from vanilla_flower.task import collate, load_model, load_work, trained

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round."""
    torch.set_num_threads(1)
    work = load_work(context)
    client = list(work["clients"])[int(context.node_config["partition-id"])]
    plan = work["rounds"][int(message.content["config"]["server-round"]) - 1][client]  # type: ignore[arg-type]
    model = load_model(work)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=False)  # type: ignore[union-attr]
    shard = work["clients"][client]
    LOOPS[bool(work["settings"].get("trainer"))](model, [[shard[i] for i in indices] for indices in plan], work["settings"])
    content = {"arrays": ArrayRecord(trained(model)), "metrics": MetricRecord({"num-examples": len(shard)})}
    return Message(RecordDict(content), reply_to=message)  # type: ignore[arg-type]


def plain_loop(model: Any, batches: list[list[dict[str, Any]]], settings: dict[str, Any]) -> None:
    """Take a step a batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=settings["lr"])
    model.train()
    for examples in batches:
        batch, targets = collate(examples)
        optimizer.zero_grad()
        F.cross_entropy(model(**batch).logits, targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def trainer_loop(model: Any, batches: list[list[dict[str, Any]]], settings: dict[str, Any]) -> None:
    """The same number of steps with Hugging Face's Trainer."""
    from transformers import Trainer, TrainingArguments

    examples = [example for batch in batches for example in batch]

    def collated(picked: list[dict[str, Any]]) -> dict[str, Any]:
        batch, targets = collate(picked)
        return {**batch, "labels": targets}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=len(batches), per_device_train_batch_size=settings["batch"], learning_rate=settings["lr"], use_cpu=True,
            lr_scheduler_type="constant", save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no", weight_decay=0.01,
            remove_unused_columns=False,
        )  # fmt: skip
        Trainer(model, arguments, data_collator=collated, train_dataset=examples).train()


LOOPS = {False: plain_loop, True: trainer_loop}
