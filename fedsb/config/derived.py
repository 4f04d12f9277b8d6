"""What a configuration leaves open and other keys decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedsb.adapters import SPECS, AdapterSpec
from fedsb.config.schema import Config
from fedsb.core.cohort import cohort_size
from fedsb.secure.threshold import threshold_of


def family(config: Config) -> AdapterSpec:
    """Return the method's adapter family, with the options that are given."""
    return SPECS[config.method.adapter].having(config.adapter.options)


def start_kind(config: Config) -> str | None:
    """Return ``init.kind``, or the adapter's own first choice where it is null; None for a family that has nothing to start.

    Under privacy a gradient start from the clients' data is no first choice: it costs epsilon, or epsilon altogether.
    """
    starts = tuple(family(config).starts)
    if config.privacy.unit != "none" and config.init.evidence == "clients" and not config.privacy.init_fraction:
        starts = tuple(kind for kind in starts if kind != "gradient") or starts
    return config.init.kind or next(iter(starts), None)


def partition_kind(config: Config) -> str:
    """Return ``federation.partition.kind``; where it is null, Dirichlet over the labels, or IID where there are none."""
    return config.federation.partition.kind or ("dirichlet" if config.data.task == "classification" else "iid")


def line_feeds(text: str) -> str:
    r"""Return a text as it is meant: ``\n``, which shells and YAML leave as two characters, is a line feed.

    It holds for each option that is a text and no name: ``data.template``, ``data.system``, ``eval.stop`` (in ``eval.pattern`` regular
    expressions have it so themselves).
    """
    return text.replace("\\n", "\n")


def ranks_of(config: Config) -> dict[str, int]:
    """Return the rank of each client where they have ranks of their own, those of ``federation.ranks`` in turn; empty elsewhere."""
    ranks = config.federation.ranks
    return {} if ranks is None else {name: ranks[i % len(ranks)] for i, name in enumerate(client_names(config))}


def client_names(config: Config) -> tuple[str, ...]:
    """Return the names of the logical clients."""
    names = config.federation.names
    return tuple(names) if names is not None else tuple(f"client-{i}" for i in range(config.federation.num_clients))


def must_stay(config: Config) -> int:
    """Return how many clients are in a secure sum at least."""
    return threshold_of(cohort_size(len(client_names(config)), config.federation.fraction), config.federation.secure_dropout)


# What clients side by side cannot have: how far one's pass is split, recomputed or scaled would have to be the others' too, and their
# factors lie on one device.
ALONE: Mapping[str, Callable[[Config], bool]] = {
    "train.accumulation": lambda c: c.train.accumulation > 1,
    "train.gradient_checkpointing": lambda c: c.train.gradient_checkpointing,
    "train.compile": lambda c: c.train.compile,
    "model.dtype": lambda c: c.model.dtype == "float16",
    "model.device_map": lambda c: c.model.device_map is not None,
    # Opacus' hooks have no gradients by example of its layers, and functorch's are of one client's values.
    "method.name": lambda c: c.privacy.unit == "example" and bool(family(c).factors) and not family(c).is_chain,
}


# What computes attention under the mask that transformers makes of runs of positions. Flash attention takes none: it looks for runs where a
# batch is one row, and reads across them where it is more; nobody knows what a kernel from a hub does.
KEEPS_APART = frozenset({"eager", "sdpa", "flex_attention"})


def alone_by(config: Config) -> str | None:
    """Return the key for which each client trains by itself; None where they may train side by side."""
    return next((key for key, holds in ALONE.items() if holds(config)), None)
