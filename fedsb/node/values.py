"""What each value of an operator's may be, in one table, whichever way it was written down."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedsb.core.errors import UserError, nearest
from fedsb.core.folders import conf_dir
from fedsb.secure.threshold import LEAST

UNIT = "example"  # the only privacy that a node can ask for: under privacy=client it has to trust the server


class NodeConfigError(UserError):
    """A node's own configuration cannot be used: nothing is answered before its operator has corrected it."""


@dataclass(frozen=True)
class Value:
    """What one value may be.

    Attributes:
        holds: tells whether it is that, of a value of any type.
        fault: says that it is not, and what is allowed; ``{key}`` stands for the key.
    """

    holds: Callable[[Any], bool]
    fault: str


def _is_number(value: Any, most: float = math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < most


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 10**9


def _are_columns(value: Any) -> bool:
    columns = (value,) if isinstance(value, str) else value
    return len(columns) in (1, 2) and all(map(_is_word, columns))


def _are_labels(value: Any) -> bool:
    names = list(value.values()) if isinstance(value, dict) else list(value)
    return len(names) >= 2 and len(set(names)) == len(names) and all(map(_is_word, names))


def methods() -> list[str]:
    """Return the names of the methods that there are."""
    return sorted(path.stem for path in (conf_dir() / "method").glob("*.yaml"))


WORD = Value(_is_word, 'is no name; give one, as in {key}="…"')
ABOVE_ZERO = Value(_is_number, "is out of range; it must be a number above 0")
WHOLE = Value(_is_whole, "is out of range; it must be a whole number of at least 1")
VALUES: Mapping[str, Value] = {
    "client": WORD,
    "rank": Value(_is_whole, "is no rank; it must be a whole number of at least 1"),
    "device": Value(
        lambda v: isinstance(v, str) and bool(re.fullmatch(r"auto|(cpu|cuda)(:\d+)?", v)), "is no device; use auto, cpu, cuda or cuda:1"
    ),
    "data.path": WORD,
    "data.text": Value(_are_columns, "is no column; give one, or a pair"),
    **{f"data.{key}": WORD for key in ("label", "prompt", "response", "messages", "choices", "template", "system", "encoding")},
    "data.train_split": WORD,
    "data.test_path": WORD,
    "data.test_fraction": Value(lambda v: _is_number(v, 1.0), "is no share; it must be above 0 and below 1"),
    "data.labels": Value(_are_labels, "names no classes; name two or more, each once"),
    "cache.folder": WORD,
    "cache.gb": ABOVE_ZERO,
    "cache.days": ABOVE_ZERO,
    "cache.own_days": Value(lambda v: _is_number(v) and v >= 1, "is out of range; it must be a number of at least 1"),
    "privacy.unit": Value(lambda v: v == UNIT, f'is not known; give {{key}}="{UNIT}", or leave it out'),
    "privacy.min_noise": ABOVE_ZERO,
    "privacy.max_epsilon": ABOVE_ZERO,
    "privacy.max_epsilon_run": ABOVE_ZERO,
    "privacy.max_delta": Value(lambda v: _is_number(v, 1.0), "is out of range; it must be between 0 and 1"),
    "privacy.max_grad_norm": ABOVE_ZERO,
    "privacy.ledger": Value(
        lambda v: isinstance(v, str) and bool(re.fullmatch(r"[A-Za-z0-9_-]{1,48}", v)), "must be at most 48 letters, digits, '-' and '_'"
    ),
    "secure.required": Value(lambda v: isinstance(v, bool), "must be true or false"),
    "secure.key": WORD,
    "secure.peers": WORD,
    "secure.min_clients": Value(lambda v: _is_whole(v) and v >= LEAST, f"is out of range; it must be a whole number of at least {LEAST}"),
    "methods": Value(lambda v: len(v) > 0, "allows nothing; name methods, or leave it out"),
    "models": Value(lambda v: len(v) > 0, "allows nothing; name models, or leave it out"),
    "limits.max_local_epochs": ABOVE_ZERO,
    "limits.max_local_steps": WHOLE,
    "limits.max_examples_per_round": WHOLE,
    "limits.max_seconds": ABOVE_ZERO,
    "limits.max_message_gb": ABOVE_ZERO,
    "evaluate": Value(lambda v: isinstance(v, bool), "is neither true nor false"),
}
_BUDGETS = ("privacy.max_epsilon", "privacy.max_epsilon_run")
# key -> the keys without one of which it would have no effect.
NEEDS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys((*_BUDGETS, "privacy.min_noise", "privacy.max_grad_norm"), ("privacy.unit",)),
    "privacy.max_delta": _BUDGETS,
}


# Two keys that cannot stand together, and why.
APART: tuple[tuple[str, str, str], ...] = (
    ("data.test_fraction", "data.test_path", "all of data.path is trained on where the held-out part has a file of its own"),
)


def hold(values: Mapping[str, Any], where: str, spelling: Mapping[str, str] | None = None, given: Mapping[str, Any] | None = None) -> None:
    """Hold what was said against the tables.

    Args:
        values: by dotted key; what was not said is not there.
        where: it was said.
        spelling: the keys as they were written there, where they were written otherwise.
        given: the values as they were written there, likewise by dotted key.

    Raises:
        NodeConfigError: the first value that cannot be used.
    """
    said = {key: key for key in VALUES} if spelling is None else spelling
    for key, value in values.items():
        if not VALUES[key].holds(value):
            shown = value if given is None else given[key]
            raise NodeConfigError(f"{said[key]}={shown!r} {where} {VALUES[key].fault.format(key=said[key])}", key=said[key])
    for key, needed in NEEDS.items():
        if key in values and not any(each in values for each in needed):
            others = " or ".join(said[each] for each in needed if each in said)
            line = f"{said[key]} {where} has no effect without {others}; add {others}, or leave {said[key]} out"
            raise NodeConfigError(line, key=said[key])
    for key, other, why in APART:
        if key in values and other in values:
            raise NodeConfigError(f"{said[key]} {where} stands beside {said[other]}: {why}; leave one of the two out", key=said[key])
    _hold_names(values, where)


def _hold_names(values: Mapping[str, Any], where: str) -> None:
    """Hold that each method is one, and that each model is named once and has a hash that is one."""
    known = methods()
    for method in values.get("methods", ()):
        if method not in known:
            raise NodeConfigError(
                f"methods {where}: unknown method '{method}'{nearest(method, known)}; known: {', '.join(known)}", key="methods"
            )
    models = values.get("models", ())
    for model in models:
        if [other.name for other in models].count(model.name) > 1:
            raise NodeConfigError(f"models {where} names '{model.name}' twice; name each once", key="models")
        if model.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", model.sha256):
            line = f"models {where}: sha256={model.sha256!r} of '{model.name}' must be 64 digits 0-9 and a-f; `fedsb node check` prints it"
            raise NodeConfigError(line, key="models")
