"""What all contestants do: a model, clients' tokenised examples, and the batches of each round."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from opacus.utils.uniform_sampler import UniformWithReplacementSampler

from fedsb.adapters import layers
from fedsb.app.assembly import corpus_of, model_of
from fedsb.app.client_data import client_features
from fedsb.config.compose import load
from fedsb.config.derived import client_names
from fedsb.config.schema import Config
from fedsb.models.fit import Site, plan_batches
from fedsb.models.loading import locate
from fedsb.privacy.randomness import simulated_streams


@dataclass(frozen=True)
class Shape:
    """Size of a step: examples, tokens of each, and steps a client takes in a round."""

    batch: int
    tokens: int
    steps: int = 4
    rank: int = 8

    @property
    def name(self) -> str:
        """How the tables call it."""
        return f"{self.batch} x {self.tokens} tokens"


def write_workload(path: Path, shape: Shape, rounds: int, *, private: bool) -> Path:
    """Write the workload, and with it the overrides that make a run of ours do the same."""
    overrides = [
        "method=fedavg_lora", f"rank={shape.rank}", "federation.num_clients=8", "federation.partition.kind=iid", "device=cpu",
        f"federation.num_rounds={rounds}", f"train.batch_size={shape.batch}", f"train.local_steps={shape.steps}",
        f"train.max_length={shape.tokens}", "runtime.threads=1", "federation.exactness=false",
        *(["privacy=example", "privacy.noise_multiplier=1", "privacy.accountant=rdp"] if private else []),
    ]  # fmt: skip
    config = load(overrides)
    labels = corpus_of(config).labels
    clients = {client: client_features(config, client, None, labels)[0] for client in client_names(config)}
    plan = private_plan if private else plain_plan
    settings = {
        "model": str(locate(config.model)),
        "labels": len(labels),
        "rank": shape.rank,
        "alpha": int(config.adapter.alpha),
        "modules": list(layers(model_of(config, labels).model)),
        "lr": config.train.lr,
        "batch": shape.batch,
    }
    examples = {client: [{key: f[key] for key in ("input_ids", "target")} for f in found] for client, found in clients.items()}
    batches = [{client: plan(config, client, examples[client], number) for client in clients} for number in range(1, rounds + 1)]
    path.write_text(json.dumps({"settings": settings, "clients": examples, "rounds": batches, "overrides": overrides}))
    return path


def with_trainer(work: Path) -> Path:
    """Write the workload again, for the app to train with Hugging Face's Trainer."""
    path = work.with_stem(f"{work.stem}-trainer")
    told = json.loads(work.read_text())
    path.write_text(json.dumps({**told, "settings": {**told["settings"], "trainer": True}}))
    return path


def plain_plan(config: Config, client: str, examples: list[dict[str, Any]], number: int) -> list[list[int]]:
    """Return the batches that ours draws."""
    site = Site(config.seed, client, number, config.federation.num_rounds)
    return plan_batches([len(e["input_ids"]) for e in examples], config.train, site)


def private_plan(config: Config, client: str, examples: list[dict[str, Any]], number: int) -> list[list[int]]:
    """Return the Poisson samples that ours draws; an empty one, which a plain Opacus loop cannot take, never comes at these rates."""
    generator = simulated_streams(config.seed, client, number, "train", torch.device("cpu")).sampling
    rate = config.train.batch_size / len(examples)
    assert config.train.local_steps is not None
    drawn = UniformWithReplacementSampler(num_samples=len(examples), sample_rate=rate, steps=config.train.local_steps, generator=generator)
    return [list(sample) or [0] for sample in drawn]
