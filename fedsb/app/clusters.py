"""Training examples by what the untouched model makes of them: k-means on the means of its last hidden states."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedsb.config.schema import Config, ModelConfig
from fedsb.core.disk import locked, make_folder, replace_whole
from fedsb.core.errors import UserError
from fedsb.core.folders import home
from fedsb.core.rng import stream_seed
from fedsb.data import Examples, pad_id
from fedsb.data.grouping import Grouping
from fedsb.models.content import content_hash
from fedsb.models.loading import load_network, load_tokenizer, place_of, resolve_device
from fedsb.models.pooling import mean_of_tokens
from fedsb.tasks.task import Task

STARTS = 4  # of k-means, of which the tightest counts
FOLDER = "partitions"


def clusters(config: Config, task: Task, train: Examples, features: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> Grouping:
    """Return the clusters of training examples, the largest first.

    They are made once and kept in ``FEDSB_HOME``: the last bits of states depend on threads and devices, and all processes of a run must
    deal alike. Lloyd's algorithm is scikit-learn's.

    Args:
        config: names the model, the seed and ``federation.partition.groups``.
        task: gives the kind of model.
        train: the examples.
        features: of these, tokenised.
        labels: names of the classes.

    Raises:
        UserError: there are more groups than examples, the model has no body whose states could be read, or they are no numbers.
    """
    count = config.federation.partition.groups
    if len(train) < count:
        raise UserError(f"federation.partition.groups={count}: there are {len(train)} training examples; lower it")
    path = home() / FOLDER / f"{_name(config, task, features, labels)}.json"
    of = _kept(path, len(train))
    if of is None:
        found = _clustered(_states(config, task, features, labels), count, stream_seed(config.seed, "partition.cluster"))
        of = _keep(path, found)
    return Grouping("cluster", tuple(f"cluster {group + 1}" for group in range(max(of) + 1)), tuple(of))


def _name(config: Config, task: Task, features: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> str:
    """Name clusters by all that makes them: the model and its content, the seed, how many there are, and the tokens of each example."""
    said = [asdict(config.model), _content(config.model), task.name, list(labels), config.seed, config.federation.partition.groups]
    digest = hashlib.sha256(json.dumps(said, default=str).encode())
    for each in features:
        digest.update(json.dumps(each["input_ids"]).encode())
    return digest.hexdigest()[:32]


def _content(model: ModelConfig) -> str:
    """Return the hash of a model's files; nothing for one of random weights, and for a hub's, which its name and revision tell."""
    place = None if model.kind == "config" else Path(place_of(model))
    return content_hash(place, home()) if place and place.exists() else ""


def _kept(path: Path, count: int) -> list[int] | None:
    """Return the cluster of each of ``count`` examples as it was kept; None where nothing was, or it is damaged."""
    with suppress(OSError, ValueError):
        of = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(of, list) and len(of) == count and all(type(group) is int and group >= 0 for group in of):
            return of
    return None


def _keep(path: Path, found: list[int]) -> list[int]:
    make_folder(path.parent)
    with locked(path.with_suffix(".lock")):
        kept = _kept(path, len(found))  # another process was faster, and its clusters count
        if kept is None:
            replace_whole(path, json.dumps(found))
        return found if kept is None else kept


def _clustered(states: NDArray[np.float64], count: int, seed: int) -> list[int]:
    from sklearn.cluster import KMeans

    with warnings.catch_warnings():  # of fewer texts that differ than clusters, which are as many then
        warnings.simplefilter("ignore")
        found = KMeans(count, n_init=STARTS, random_state=seed % 2**32).fit_predict(states)
    _, found = np.unique(found, return_inverse=True)
    order = np.argsort(-np.bincount(found), kind="stable")
    return [int(place) for place in np.argsort(order)[found]]


def _states(config: Config, task: Task, features: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> NDArray[np.float64]:
    """Return the mean of the last hidden states over each example's tokens, of the model as it is before any training."""
    network = load_network(config.model, task, labels, config.seed, resolve_device(config.device)).eval()
    device = next(network.parameters()).device  # of one that is to be spread over GPUs the CPU
    body = getattr(network, str(getattr(network, "base_model_prefix", "")), None)
    if not isinstance(body, nn.Module):
        raise UserError(f"federation.partition.kind=cluster needs a model with a body, which {type(network).__name__} lacks; use length")
    tokenizer = load_tokenizer(config.model)
    padding = 0 if tokenizer is None else pad_id(tokenizer)
    # In order of length, so that little is padded.
    order = sorted(range(len(features)), key=lambda i: len(features[i]["input_ids"]))
    found = np.zeros((len(features), 0))
    with torch.no_grad():
        for rows in _in_batches(order, config.train.eval_batch_size):
            ids, mask = _padded([features[i]["input_ids"] for i in rows], padding)
            hidden = body(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
            states = mean_of_tokens(hidden, mask).double().cpu().numpy()
            found = found if found.shape[1] else np.zeros((len(features), states.shape[1]))
            found[rows] = states
    if not np.isfinite(found).all():
        raise UserError(f"federation.partition.kind=cluster: states of texts overflow in model.dtype={config.model.dtype}; use length")
    return found


def _in_batches(rows: Sequence[int], size: int) -> Iterator[list[int]]:
    yield from (list(rows[first : first + size]) for first in range(0, len(rows), size))


def _padded(rows: Sequence[Sequence[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
