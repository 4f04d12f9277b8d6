"""From a configuration to the parts of a run. The composition roots call this; nothing below it sees a whole ``Config``.

What is expensive (data, tokens, model) is made once a process and reused by every message and, in a sweep, by every job.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from fedsb.config.checks import check
from fedsb.config.derived import client_names
from fedsb.config.schema import Config
from fedsb.core.errors import UserError
from fedsb.core.folders import home
from fedsb.core.logs import speech
from fedsb.core.rng import numpy_generator
from fedsb.data import (
    PATHLESS,
    Corpus,
    Examples,
    answered_corpus,
    load_corpus,
    load_test,
    natural_order,
    partition,
    thin,
    tokenise,
    tokenise_marked,
    way_of,
)
from fedsb.data.grouping import Grouping, by_length
from fedsb.data.skew import Skew, skew_of
from fedsb.models.adapted import AdaptedModel
from fedsb.models.build import cached_model
from fedsb.models.loading import load_tokenizer, resolve_device
from fedsb.report.progress import PROGRESS, Progress
from fedsb.tasks.task import TASKS, Task

Features = list[dict[str, Any]]
Value = TypeVar("Value")
BEYOND_LABELS = ("length", "cluster", "quantity")
_MEMO: dict[str, dict[str, Any]] = {}


def once(kind: str, key: object, make: Callable[[], Value]) -> Value:
    """Return the value for ``key``, made at most once while it is the last of its kind."""
    table = _MEMO.setdefault(kind, {})
    name = repr(key)
    if name not in table:
        table.clear()
        table[name] = make()
    value: Value = table[name]
    return value


def forget_data() -> None:
    """Forget data, tokens and tokenizers."""
    _MEMO.clear()


def task_of(config: Config) -> Task:
    """Return the task."""
    return TASKS[config.model.task or config.data.task]


def corpus_of(config: Config) -> Corpus:
    """Load the data as a simulation does, all of it; or the server's test file where it holds no training data."""
    column = config.federation.partition.column if config.federation.partition.kind == "natural" else None
    served = config.data.path is None and config.data.test_path is not None and config.data.kind not in PATHLESS

    def loaded() -> Corpus:
        corpus = load_test(config.data) if served else load_corpus(config.data, config.seed, column)
        if way_of(config.data) is None or (config.model.kind == "config" and config.model.tokenizer is None):
            return corpus
        every_row = config.privacy.unit == "example"
        return answered_corpus(corpus, tokenizer_of(config), config.data, config.train.max_length, every_row=every_row)

    return once("corpus", (config.data, config.seed, column, cut_by(config)), loaded)


def cut_by(config: Config) -> object:
    """Return what decides which rows of instruction data have something to learn."""
    return (config.model, config.train.max_length, config.privacy.unit) if way_of(config.data) else None


def peopled(config: Config) -> Config:
    """Return the configuration with its clients by name: those of a natural partition are the owners that its column names.

    Raises:
        UserError: the table names no owner, or names more or fewer than ``federation.num_clients``.
    """
    federation = config.federation
    if federation.partition.kind != "natural" or federation.names is not None:
        return config
    if federation.partition.column is None:
        raise UserError("federation.partition.kind=natural needs the column that names the owner: add federation.partition.column=…")
    owners = natural_order(corpus_of(config).train.owners or ())
    if not owners:
        raise UserError("federation.partition.kind=natural finds no table here to deal out; name the clients: federation.names=[…]")
    if federation.num_clients not in (0, len(owners)):
        raise UserError(
            f"federation.partition.column={federation.partition.column} names {len(owners)} owners in the training part for "
            f"{federation.num_clients} clients; leave federation.num_clients out, or choose another column"
        )
    named = replace(config, federation=replace(federation, names=owners, num_clients=len(owners)))
    check(named)
    return named


def parts_of(config: Config) -> dict[str, tuple[int, ...]]:
    """Return which training examples each simulated client holds; empty on a server that holds no training data."""
    corpus = corpus_of(config)
    if not len(corpus.train):
        return {}
    key = (config.data, config.seed, config.federation.partition, client_names(config), cut_by(config), _clustered_by(config))
    dealing, names = config.federation.partition, client_names(config)
    return once("parts", key, lambda: partition(corpus.train, dealing, names, config.seed, _grouping(config)))


def _clustered_by(config: Config) -> object:
    return (config.model, config.train.max_length) if config.federation.partition.kind == "cluster" else None


def _grouping(config: Config) -> Grouping | None:
    """Return the groups that a simulation's examples are dealt by; None where they are dealt by something else."""
    train, dealing = corpus_of(config).train, config.federation.partition
    if dealing.kind == "length":
        return by_length(train, dealing.groups)
    if dealing.kind != "cluster":
        return None
    from fedsb.app.clusters import clusters  # scikit-learn, for who asks for it

    key = (config.data, config.seed, dealing.groups, cut_by(config), _clustered_by(config))
    return once("clusters", key, lambda: clusters(config, task_of(config), train, features_of(config, train), corpus_of(config).labels))


def skew_in(config: Config) -> Skew | None:
    """Return how a simulation's examples are dealt out; None on a server that holds no training data."""
    corpus, parts = corpus_of(config), parts_of(config)
    if not parts:
        return None
    kind = str(config.federation.partition.kind)
    return skew_of(corpus.train, parts, corpus.labels, by=kind if kind in BEYOND_LABELS else "", grouping=_grouping(config))


def features_of(config: Config, examples: Examples) -> Features:
    """Tokenise examples and put their targets beside the tokens."""
    if way_of(config.data):
        return [dict(f) for f in tokenise_marked(examples, tokenizer_of(config), config.data, config.train.max_length)]
    ends = not task_of(config).has_head
    features = [dict(f) for f in tokenise(examples, tokenizer_of(config), config.train.max_length, ends=ends)]
    if examples.targets is None:
        return features
    return [{**f, "target": target} for f, target in zip(features, examples.targets, strict=True)]


def tokenizer_of(config: Config) -> PreTrainedTokenizerBase:
    """Return the tokenizer.

    Raises:
        UserError: the model has none, or one that cannot be used.
    """
    tokenizer = once("tokenizer", config.model, lambda: load_tokenizer(config.model))
    if tokenizer is None:
        raise UserError(f"model '{config.model.name}' has no tokenizer; set model.tokenizer to a folder or hub id")
    return tokenizer


TEST, VALIDATION = "test", "validation"


def measured_examples(config: Config, part: str = TEST) -> Examples:
    """Return what the server measures on: the validation part, or of the test part what ``eval.max_examples`` leaves.

    Raises:
        UserError: there is no validation part.
    """
    if part == VALIDATION:
        if (found := corpus_of(config).validation) is None or not len(found):
            raise UserError("eval.select finds no validation part here; set data.validation_path=…")
        return found
    return thin(corpus_of(config).test, config.eval.max_examples, numpy_generator(config.seed, "eval.max_examples"))


def measured_features(config: Config, part: str = TEST) -> Features:
    """Return the examples of :func:`measured_examples`, tokenised."""
    key = (config.data, config.model, config.train.max_length, config.seed, config.eval.max_examples)
    return once(part, key, lambda: features_of(config, measured_examples(config, part)))


def public_features(config: Config) -> Features:
    """Return the tokenised public split.

    Raises:
        UserError: there is none.
    """
    public = corpus_of(config).public
    if public is None or not len(public):
        raise UserError("init.evidence=public needs text the server may hold; set data.public_path=… or data.public_fraction=0.05")
    return features_of(config, public)


def model_of(config: Config, labels: tuple[str, ...], device: str | None = None) -> AdaptedModel:
    """Return the process's model with its adapters, on the configured device or another one."""
    return cached_model(
        config.model,
        config.adapter,
        family=config.method.adapter,
        task=task_of(config),
        labels=labels,
        seed=config.seed,
        device=resolve_device(device or config.device),
        hold=config.frozen.hold,
    )


def progress_of(config: Config) -> Progress:
    """Return what shows a run while it is under way."""
    train, clients, steps = config.train, config.federation.num_clients, config.train.local_steps
    held = len(corpus_of(config).train)  # none on a server of real nodes
    examples = steps * train.batch_size if steps is not None else train.local_epochs * held / clients if held else None
    return PROGRESS[speech(config.progress)](config.federation.num_rounds, examples=examples)


def run_folder(config: Config, run: str, given: str | None = None) -> Path:
    """Return the folder of a run: that of a resumed one, else as the command line has set it, else ``output``, else under :func:`home`."""
    return Path(config.resume or given or config.output or home() / "runs" / run)
