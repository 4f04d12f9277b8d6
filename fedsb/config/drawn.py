"""Random search: points drawn from ranges and lists, the same for equal seeds on every machine."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override

from fedsb.core.errors import UserError

DIGITS = 3  # of a drawn number: a folder is called by it


def drawn(overrides: Sequence[str], samples: int | None, seed: int) -> tuple[list[str], list[list[str]]]:
    """Return the overrides that name their values, and drawn points of the others: ``samples`` of them, or an empty one.

    Args:
        overrides: of which ``interval(a,b)``, ``tag(log,interval(a,b))`` and ``shuffle(a,b,…)`` are drawn from; ``int(interval(a,b))``
            gives whole numbers.
        samples: number of points; None draws none.
        seed: of the draws. Each key has its own, so that another one beside it changes nothing.

    Raises:
        UserError: there is one to draw from and no number of samples, or one to draw logarithmically that begins at 0 or below.
    """
    parsed = [OverridesParser.create().parse_override(text) for text in overrides]
    ranges = [each for each in parsed if _is_drawn(each)]
    if ranges and samples is None:
        raise UserError(f"'{ranges[0].input_line}' is to be drawn from: add sweep.samples=N, or name the values")
    plain = [text for text, each in zip(overrides, parsed, strict=True) if each not in ranges]
    columns = [[f"{each.get_key_element()}={value}" for value in _draws(each, samples or 0, seed)] for each in ranges]
    return plain, [list(row) for row in dict.fromkeys(zip(*columns, strict=True))] or [[]]


def _is_drawn(override: Override) -> bool:
    value = override.value()
    return isinstance(value, IntervalSweep) or (isinstance(value, ChoiceSweep) and value.shuffle)


def _draws(override: Override, samples: int, seed: int) -> list[str]:
    value, source = override.value(), random.Random(f"{seed} {override.get_key_element()}")
    if isinstance(value, ChoiceSweep):
        named = list(override.sweep_string_iterator())
        return [source.choice(sorted(named)) for _ in range(samples)]
    assert isinstance(value, IntervalSweep)
    whole, log = isinstance(value.start, int), "log" in value.tags
    low, high = float(value.start or 0), float(value.end or 0)
    if log and min(low, high) <= 0:
        raise UserError(f"'{override.input_line}' is drawn by its logarithm, and must begin above 0")
    found = [math.exp(source.uniform(math.log(low), math.log(high))) if log else source.uniform(low, high) for _ in range(samples)]
    return [str(round(x)) if whole else f"{x:.{DIGITS}g}" for x in found]
