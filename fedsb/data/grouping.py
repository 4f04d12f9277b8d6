"""Groups of examples that a partition can go by where labels say too little: by length here, by what a model makes of them elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsb.data.examples import Examples


@dataclass(frozen=True)
class Grouping:
    """Groups that examples fall into.

    Attributes:
        by: what makes them: ``length`` or ``cluster``.
        names: of the groups.
        of: the group of each example, by its index in the names.
    """

    by: str
    names: tuple[str, ...]
    of: tuple[int, ...]


def by_length(train: Examples, count: int) -> Grouping:
    """Group examples by their length in characters, both texts of a pair together, into at most ``count`` groups of about the same size.

    Examples of one length are in one group, so that there may be fewer.
    """
    pairs = train.pairs or ("",) * len(train)
    lengths = np.array([len(text) + len(other) for text, other in zip(train.texts, pairs, strict=True)])
    ranked = np.sort(lengths)
    bounds = np.unique([part[-1] for part in np.array_split(ranked, count) if len(part)])
    of = np.searchsorted(bounds, lengths)
    names = tuple(f"{lengths[of == group].min():,} to {bound:,} characters" for group, bound in enumerate(bounds))
    return Grouping("length", names, tuple(of.tolist()))
