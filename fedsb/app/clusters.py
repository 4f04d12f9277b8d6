"""Training examples by what the untouched model makes of them: k-means on the means of its last hidden states."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedsb.config.schema import Config
from fedsb.core.disk import create_whole, make_folder
from fedsb.core.errors import UserError
from fedsb.core.folders import home
from fedsb.core.rng import stream_seed
from fedsb.data import Examples, pad_id
from fedsb.data.grouping import Grouping
from fedsb.models.loading import load_network, load_tokenizer, resolve_device
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
        UserError: there are more groups than examples, or the model has no body whose states could be read.
    """
    count = config.federation.partition.groups
    if len(train) < count:
        raise UserError(f"federation.partition.groups={count}: there are {len(train)} training examples; lower it")
    said = json.dumps([asdict(config.model), config.train.max_length, config.seed, count, train.sha256()], default=str)
    path = home() / FOLDER / f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.json"
    if not path.is_file():
        found = _clustered(_states(config, task, features, labels), count, stream_seed(config.seed, "partition.cluster"))
        make_folder(path.parent)
        with suppress(FileExistsError):  # another process was faster, and its clusters count
            create_whole(path, json.dumps(found))
    of = json.loads(path.read_text(encoding="utf-8"))
    return Grouping("cluster", tuple(f"cluster {group + 1}" for group in range(max(of) + 1)), tuple(of))


def _clustered(states: NDArray[np.float64], count: int, seed: int) -> list[int]:
    from sklearn.cluster import KMeans

    found = KMeans(count, n_init=STARTS, random_state=seed % 2**32).fit_predict(states)
    _, found = np.unique(found, return_inverse=True)
    order = np.argsort(-np.bincount(found), kind="stable")
    return [int(place) for place in np.argsort(order)[found]]


def _states(config: Config, task: Task, features: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> NDArray[np.float64]:
    """Return the mean of the last hidden states over each example's tokens, of the model as it is before any training."""
    device = resolve_device(config.device)
    network = load_network(config.model, task, labels, config.seed, device).eval()
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
    return found


def _in_batches(rows: Sequence[int], size: int) -> Iterator[list[int]]:
    yield from (list(rows[first : first + size]) for first in range(0, len(rows), size))


def _padded(rows: Sequence[Sequence[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
