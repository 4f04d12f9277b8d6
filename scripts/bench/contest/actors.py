"""How much of the base model an actor holds for itself."""

from __future__ import annotations

import os
import shlex
import tempfile
from importlib import import_module

import psutil
import ray
import torch
from torch import nn

from fedsb.app.asked import config_of
from fedsb.app.assembly import corpus_of, model_of
from fedsb.app.client_data import client_features
from fedsb.app.prepare import prepare
from fedsb.config.compose import load
from fedsb.runtime.grids import CLIENT, TOGETHER
from fedsb.runtime.pool import Pool, PoolSettings, close_pools, pool_for
from fedsb.runtime.ray import RayGrid
from fedsb.wire.arrays import encode_arrays

OVERRIDES = (
    "method=fed_sb", "rank=16", "init.kind=weight_svd", "federation.num_clients=2", "federation.num_rounds=1", "device=cpu",
    "federation.partition.kind=iid", "train.local_steps=1", "train.batch_size=1", "train.max_length=8",
)  # fmt: skip


def measure() -> tuple[float, float, float]:
    """Return the base model's MB, and an actor's own memory beyond that of one without a model, as shares of it: before a step and after.

    The actor without a model has read the same data and taken an optimiser step of a toy: what a first step imports is no copy of weights.
    """
    pool = pool_for(PoolSettings(CLIENT, TOGETHER, workers=2, cpus=0.5))
    pool.fill()
    while pool.starting:
        pool.came(ray.wait(pool.starting, num_returns=1)[0])
    config = load(list(OVERRIDES))
    labels = corpus_of(config).labels
    with tempfile.TemporaryDirectory() as folder:
        run_config = {"overrides": shlex.join(OVERRIDES), "output": folder}
        prepared = prepare(config)
        base = sum(p.nbytes for name, p in prepared.adapted.model.named_parameters()) / 1e6
        empty = told(pool, warm_without_model, run_config["overrides"], labels)
        loaded = told(pool, own_mb_with_model, run_config["overrides"], labels)
        grid = RayGrid.simulation(pool, run_config)
        prepared.strategy.start(grid, encode_arrays(prepared.initial), num_rounds=1)
        trained = told(pool, own_mb)
    close_pools()
    return base, (loaded - empty) / base, (trained - empty) / base


def told(pool: Pool, function: object, *arguments: object) -> float:
    """Run a function in the actor's process, with the pool's networks at hand."""
    actor = pool.take()
    number: float = ray.get(actor.call.remote(function, *arguments, networks=pool.networks))
    pool.give_back(actor)
    return number


def own_mb() -> float:
    """Return this process's own memory: private pages, not those that it maps with others."""
    return float(psutil.Process(os.getpid()).memory_full_info().uss) / 1e6


def warm_without_model(overrides: str, labels: tuple[str, ...]) -> float:
    """Do what a message does with a toy in place of the model: read data, tokenise, take a step; return the memory then."""
    import_module("transformers.models.bert.modeling_bert")
    config = config_of(overrides)
    client_features(config, "client-0", None, labels)
    toy = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(toy.parameters())
    toy(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return own_mb()


def own_mb_with_model(overrides: str, labels: tuple[str, ...]) -> float:
    """Build the model and return the memory then."""
    model_of(config_of(overrides), labels)
    return own_mb()
