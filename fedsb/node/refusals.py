"""What a client says when it does not answer: a code, and a key of the configuration; never text, which can carry data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import get_type_hints

from fedsb.config.schema import Config
from fedsb.core.errors import UserError
from fedsb.node.policy import KEYS as NODE_KEYS
from fedsb.node.policy import NodeConfigError, PolicyError
from fedsb.privacy.codes import BY_NUMBER, CODES, UNKNOWN, BudgetExceeded, Code, OwnStateLost, SelfCheckFailed, StartDiffers


def _leaves(kind: type, before: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            yield from _leaves(hint, f"{before}{name}.")  # type: ignore[arg-type]
        else:
            yield before + name


# The closed list of what a reply may name beside its code.
KEYS = frozenset({*_leaves(Config), *NODE_KEYS})
# How the project's own messages begin where one key is at fault; what follows may come from data.
_AT_FAULT = re.compile(r"(?:unknown )?([a-z_.-]+)(?:[=:]| ')")


def code_of(error: BaseException) -> Code:
    """Return the code that an exception travels as."""
    if isinstance(error, SelfCheckFailed):
        return error.code
    return next((CODES[name] for kind, name in _NAMED if isinstance(error, kind)), CODES["failed"])


# The first that fits: the last is the kind of all before it.
_NAMED: tuple[tuple[type[Exception], str], ...] = (
    (BudgetExceeded, "budget"),
    (OwnStateLost, "own_state"),
    (NodeConfigError, "node_config"),
    (PolicyError, "policy"),
    (StartDiffers, "start"),
    (UserError, "refused"),
)


def key_of(error: BaseException) -> str | None:
    """Return the key of the configuration that an error is about, out of :data:`KEYS`; None where it is about none, or several."""
    if not isinstance(error, UserError):
        return None
    begins = _AT_FAULT.match(str(error))
    found = error.key or (begins and begins[1])
    return found if found in KEYS else None


def shown(number: int, key: str) -> str:
    """Return what the server shows of a code and a key as they came; of a key that is none, nothing."""
    text = BY_NUMBER.get(number, UNKNOWN).text
    return f"{text} (key at fault: {key})" if key in KEYS else text
