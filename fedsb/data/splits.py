"""Training, test and public parts. Every draw comes from a stream of its own, so one option never moves another's draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsb.config.schema import DataConfig
from fedsb.core.errors import UserError
from fedsb.core.rng import numpy_generator
from fedsb.data.examples import Examples, find_labels, read_examples
from fedsb.data.sources import Raw, read_path, read_raw


@dataclass(frozen=True)
class Corpus:
    """What a run works on.

    Attributes:
        train: what clients share out among themselves.
        test: what the server evaluates on.
        public: what the server may look at for the start, if anything.
        validation: what the server chooses the best round by, if anything.
        labels: names of the classes in order of their index; empty unless the task is classification.
        dropped: by part how many rows are left out, since what is read of them has nothing to learn.
    """

    train: Examples
    test: Examples
    public: Examples | None
    labels: tuple[str, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)
    validation: Examples | None = None


def load_corpus(cfg: DataConfig, seed: int, owner_column: str | None = None) -> Corpus:
    """Load a source whole, as a simulation does, and cut it into its parts.

    ``max_examples`` thins the training rows before anything is split off; test rows of their own are kept whole. Draws are
    stratified by class, and every class keeps at least one training example (as long as ``max_examples`` has room for it).

    Args:
        cfg: the source, its columns and its splits.
        seed: seed of the run.
        owner_column: natural column to keep for the training part.

    Raises:
        UserError: anything wrong with the source or its columns, or a part that would be empty.
    """
    _check(cfg)
    raw = read_raw(cfg, owner_column)
    labels = find_labels(raw.train, cfg)
    train = thin(read_examples(raw.train, cfg, labels, owner_column), cfg.max_examples, numpy_generator(seed, "data.max_examples"))
    given = _given_test(raw, cfg, labels)
    train, test = (train, given) if given is not None else _split_off(train, cfg.test_fraction, seed, "test")
    train, public = _public(train, cfg, labels, seed)
    train, validation = _split_off(train, cfg.validation_fraction, seed, "validation") if cfg.validation_fraction else (train, None)
    validation = _own_file(cfg.validation_path, cfg, labels, "validation") if cfg.validation_path else validation
    return Corpus(train=train, test=test, public=public, labels=labels, validation=validation)


def load_test(cfg: DataConfig) -> Corpus:
    """Load what the server of a real federation holds: ``data.test_path``, perhaps ``data.public_path``, and no training part.

    Raises:
        UserError: no test path, or anything wrong with the files.
    """
    if cfg.test_path is None:
        raise UserError("data.test_path must be given on a server that holds no training data: add data.test_path=…")
    rows = read_path(cfg.test_path, cfg, split="test")
    labels = find_labels(rows, cfg, part="test")
    test = read_examples(rows, cfg, labels, part="test")
    public, validation = (
        _own_file(path, cfg, labels, part) for part, path in (("public", cfg.public_path), ("validation", cfg.validation_path))
    )
    return Corpus(train=test.take(()), test=test, public=public, labels=labels, validation=validation)


def load_site(cfg: DataConfig, path: str | Path, labels: tuple[str, ...]) -> Examples:
    """Load the training part of one client of a real federation: the whole table at ``path``, in its order.

    Args:
        cfg: names the columns.
        path: a file or folder of the client's own.
        labels: names of the classes of the run, in order.

    Raises:
        UserError: anything wrong with the file, or a label that the run does not have.
    """
    return read_examples(read_path(path, cfg), cfg, labels, part="site")


def hold_out(examples: Examples, fraction: float, *, seed: int, client: str, by_place: bool = False) -> tuple[Examples, Examples]:
    """Split a client's part into what it trains on and what it evaluates on; both keep their order.

    The second may be empty: a client with one example of each class holds nothing out.

    Args:
        examples: of the client.
        fraction: that is held out, in [0, 1].
        seed: of the draw.
        client: likewise.
        by_place: draw by number alone, as :func:`places_held` does; otherwise by class, where one label decides about other examples.
    """
    if by_place:
        return _cut(examples, places_held(len(examples), fraction, seed=seed, client=client))
    chosen = draw(examples, fraction, numpy_generator(seed, "data.hold_out", client), leave_one=True)
    return _cut(examples, chosen)


def places_held(count: int, fraction: float, *, seed: int, client: str) -> NDArray[np.int64]:
    """Return which of ``count`` examples are held out, sorted: ``fraction`` of them, never all, drawn without a look at what they hold."""
    size = min(round(fraction * count), max(0, count - 1))
    return np.sort(numpy_generator(seed, "data.hold_out", client).choice(count, size, replace=False)).astype(np.int64)


def draw(
    examples: Examples, fraction: float, generator: np.random.Generator, *, leave_one: bool = False, take_one: bool = False
) -> NDArray[np.int64]:
    """Draw a share of the examples at random, stratified by class.

    Of a class with ``n`` examples, ``fraction * n`` are drawn, rounded up or down so that the total is right.

    Args:
        examples: stratified by ``targets`` where those are classes.
        fraction: in [0, 1].
        generator: where the draw comes from.
        leave_one: leave at least one of each class, even where the share rounds to all of them.
        take_one: draw at least one of each class, at the cost of those that have the most drawn, while there are some with two.

    Returns:
        Sorted indices.
    """
    groups = _groups(examples)
    exact = np.array([fraction * len(group) for group in groups])
    quotas = np.floor(exact).astype(np.int64)
    closest = np.argsort(quotas - exact, kind="stable")
    quotas[closest[: round(float(exact.sum())) - int(quotas.sum())]] += 1
    if take_one:
        _spread(quotas)
    if leave_one:
        quotas = np.minimum(quotas, [len(group) - 1 for group in groups])
    chosen = [generator.permutation(group)[:quota] for group, quota in zip(groups, quotas, strict=True)]
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, dtype=np.int64)


def _spread(quotas: NDArray[np.int64]) -> None:
    for empty in np.flatnonzero(quotas == 0):
        most = int(np.argmax(quotas))
        if quotas[most] > 1:
            quotas[most] -= 1
            quotas[empty] += 1


def _groups(examples: Examples) -> list[NDArray[np.int64]]:
    targets = examples.targets
    if not targets or not isinstance(targets[0], int):
        return [np.arange(len(examples))] if len(examples) else []
    classes = np.array(targets)
    return [np.flatnonzero(classes == label) for label in np.unique(classes)]


def _cut(examples: Examples, chosen: NDArray[np.int64]) -> tuple[Examples, Examples]:
    rest = np.setdiff1d(np.arange(len(examples)), chosen)
    return examples.take(rest), examples.take(chosen)


def _check(cfg: DataConfig) -> None:
    if cfg.test_path and cfg.test_split:
        raise UserError(f"data.test_path={cfg.test_path} and data.test_split={cfg.test_split} both name the test part; give one of them")
    if cfg.public_path and cfg.public_fraction:
        raise UserError(
            f"data.public_path={cfg.public_path} and data.public_fraction={cfg.public_fraction} both name a public part; give one"
        )
    if cfg.validation_path and cfg.validation_fraction:
        raise UserError(
            f"data.validation_path={cfg.validation_path} and data.validation_fraction={cfg.validation_fraction} both name a validation "
            "part; give one"
        )


def thin(examples: Examples, most: int | None, generator: np.random.Generator) -> Examples:
    """Return at most ``most`` of the examples, in their order, drawn at random and by class; all of them where it is None."""
    if most is None or len(examples) <= most:
        return examples
    return examples.take(draw(examples, most / len(examples), generator, take_one=True))


def _given_test(raw: Raw, cfg: DataConfig, labels: tuple[str, ...]) -> Examples | None:
    rows = read_path(cfg.test_path, cfg, split="test") if cfg.test_path else raw.test
    return None if rows is None else read_examples(rows, cfg, labels, part="test")


def _own_file(path: str | None, cfg: DataConfig, labels: tuple[str, ...], part: str) -> Examples | None:
    return None if path is None else read_examples(read_path(path, cfg), cfg, labels, part=part)


def _public(train: Examples, cfg: DataConfig, labels: tuple[str, ...], seed: int) -> tuple[Examples, Examples | None]:
    if cfg.public_fraction:
        return _split_off(train, cfg.public_fraction, seed, "public")
    return train, _own_file(cfg.public_path, cfg, labels, "public")


def _split_off(train: Examples, fraction: float, seed: int, part: str) -> tuple[Examples, Examples]:
    rest, drawn = _cut(train, draw(train, fraction, numpy_generator(seed, f"data.{part}"), leave_one=True))
    if not len(drawn):
        raise UserError(f"data.{part}_fraction={fraction} of {len(train)} examples leaves the {part} part empty; raise it or add data")
    return rest, drawn
