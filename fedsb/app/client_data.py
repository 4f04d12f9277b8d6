"""The data of one client: what it trains on and what it holds out, in a simulation or at a real node."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeGuard

from fedsb.app.assembly import Features, corpus_of, cut_by, features_of, once, parts_of, task_of, tokenizer_of
from fedsb.config.derived import client_names
from fedsb.config.schema import Config
from fedsb.core.errors import UserError
from fedsb.data import Examples, PrivateRows, answered, hold_out, load_site, places_held, shortened, way_of
from fedsb.node.own_data import at_site, private_count, private_features, private_rows

HELD_OUT = " held out"  # ends the kind of what is of a file of its own


def client_examples(config: Config, client: str, data_path: str | None, labels: tuple[str, ...]) -> tuple[Examples, Examples]:
    """Return what a client trains on and what it holds out: a share of its data, or at a real node a file that its operator has named.

    Args:
        config: the run's configuration, on a real node with what is the node's own.
        client: logical client.
        data_path: the operator's own data on a real node; None in a simulation.
        labels: class names as the server sent them.

    Raises:
        UserError: the client is not part of the simulation, or its data cannot be read.
    """
    if _is_private_site(data_path, config):
        train, held_out = _private_parts(config, client, data_path, labels)
        return train.examples, held_out.examples
    if data_path is not None:
        examples = _read_site(config, data_path, labels)
        if config.data.test_path is not None:
            return examples, _read_site(config, config.data.test_path, labels, HELD_OUT)
    else:
        parts = parts_of(config)
        if client not in parts:
            raise UserError(f"no simulated client '{client}'; known: {', '.join(sorted(parts)[:8])}")
        examples = corpus_of(config).train.take(parts[client])
    by_place = config.privacy.unit == "example"
    return hold_out(examples, config.data.client_test_fraction, seed=config.seed, client=client, by_place=by_place)


def _read_site(config: Config, path: str, labels: tuple[str, ...], part: str = "") -> Examples:
    return once(f"site{part}", (config.data, path, labels, cut_by(config)), lambda: _site(config, path, labels, part))


def _site(config: Config, path: str, labels: tuple[str, ...], part: str) -> Examples:
    examples = _rows(config, path, labels, part)
    if way_of(config.data) is None:
        return examples
    return at_site(lambda: answered(examples, tokenizer_of(config), config.data, config.train.max_length, part="site"))


def site_rows(config: Config, data_path: str, labels: tuple[str, ...]) -> Iterator[Examples]:
    """Yield every row of a real node's data, those included of which nothing is learnt, and those that are held out in a file of their own.

    Raises:
        UserError: the data cannot be read.
    """
    yield _rows(config, data_path, labels)
    if config.data.test_path is not None:
        yield _rows(config, config.data.test_path, labels, HELD_OUT)


def _rows(config: Config, path: str, labels: tuple[str, ...], part: str = "") -> Examples:
    if _is_private_site(path, config):
        return _private_rows(config, path, labels, part).examples
    return once(f"site rows{part}", (config.data, path, labels), lambda: at_site(lambda: load_site(config.data, path, labels)))


def num_examples(config: Config, client: str, data_path: str | None, labels: tuple[str, ...]) -> int:
    """Return how many training examples a client has; on a real node under ``privacy.unit=example`` its rows are counted and not read.

    Raises:
        UserError: see :func:`client_examples`.
    """
    if _is_private_site(data_path, config):
        count = private_count(config.data, data_path)
        return count - len(_places(config, client, count))
    return len(client_examples(config, client, data_path, labels)[0])


def counts_dealt(config: Config, labels: tuple[str, ...]) -> dict[str, int]:
    """Return how many training examples each client of a simulation has."""
    return {client: num_examples(config, client, None, labels) for client in client_names(config)}


def _is_private_site(data_path: str | None, config: Config) -> TypeGuard[str]:
    return data_path is not None and config.privacy.unit == "example"


def _private_rows(config: Config, data_path: str, labels: tuple[str, ...], part: str = "") -> PrivateRows:
    key = (config.data, config.model.task, data_path, labels)
    return once(f"private site{part}", key, lambda: private_rows(config.data, data_path, labels, task_of(config)))


def _private_parts(config: Config, client: str, data_path: str, labels: tuple[str, ...]) -> tuple[PrivateRows, PrivateRows]:
    rows = _private_rows(config, data_path, labels)
    if config.data.test_path is not None:
        return rows, _private_rows(config, config.data.test_path, labels, HELD_OUT)
    held = _places(config, client, len(rows.examples))
    return rows.take(sorted({*range(len(rows.examples))}.difference(held))), rows.take(held)


def _places(config: Config, client: str, count: int) -> Sequence[int]:
    """Return which rows of a real node's own are held out under ``privacy.unit=example``: by their places, whatever they hold."""
    if config.data.test_path is not None:
        return []
    return [*map(int, places_held(count, config.data.client_test_fraction, seed=config.seed, client=client))]


def client_features(config: Config, client: str, data_path: str | None, labels: tuple[str, ...]) -> tuple[Features, Features]:
    """Return a client's tokenised training and held-out examples."""
    key = (config.data, config.model, config.train.max_length, config.seed, config.federation, config.privacy.unit, labels)
    # As many clients as there are: together they hold the data once, and one that was dropped would be tokenised again each round.
    known: dict[tuple[str, str | None], tuple[Features, Features]] = once("features", key, dict)
    if (client, data_path) not in known:
        if _is_private_site(data_path, config):
            train, held_out = (_private_features(config, part) for part in _private_parts(config, client, data_path, labels))
        else:
            train, held_out = (features_of(config, part) for part in client_examples(config, client, data_path, labels))
        known[client, data_path] = train, held_out
    return known[client, data_path]


def _private_features(config: Config, rows: PrivateRows) -> Features:
    task, most = task_of(config), config.train.max_length
    own = {"shorten": lambda text, characters: shortened(text, characters, most)} if way_of(config.data) else {}
    return private_features(rows, most, lambda e: features_of(config, e), no_target=task.no_target, **own)
