"""What a client says when it does not answer: a code, and a key of the configuration; never text, which can carry data."""

from __future__ import annotations

import re

from fedsb.config.explaining import known_keys
from fedsb.core.errors import UserError
from fedsb.node.deadline import TimeOver
from fedsb.node.reading import FILE, PAIRS
from fedsb.node.request import PolicyError
from fedsb.node.settings import NodeConfig
from fedsb.node.values import NodeConfigError
from fedsb.privacy.codes import BY_NUMBER, CODES, UNKNOWN, BudgetExceeded, Code, OwnStateLost, SelfCheckFailed, StartDiffers
from fedsb.secure.session import SecureError, UnsignedError
from fedsb.wire.arrays import LayoutDiffers

# The closed list of what a reply may name beside its code.
KEYS = frozenset({*known_keys(), *known_keys(NodeConfig), *PAIRS, FILE})
# How the project's own messages begin where one key is at fault; what follows may come from data.
_AT_FAULT = re.compile(r"(?:unknown )?([a-z_.-]+)(?:[=:]| ')")


def code_of(error: BaseException) -> Code:
    """Return the code that an exception travels as."""
    if isinstance(error, SelfCheckFailed):
        return error.code
    if isinstance(error, PolicyError):
        return CODES[error.code]
    return next((CODES[name] for kind, name in _NAMED if isinstance(error, kind)), CODES["failed"])


# The first that fits: the last is the kind of all before it.
_NAMED: tuple[tuple[type[BaseException], str], ...] = (
    (TimeOver, "time"),
    (BudgetExceeded, "budget"),
    (OwnStateLost, "own_state"),
    (NodeConfigError, "node_config"),
    (StartDiffers, "start"),
    (UnsignedError, "unsigned"),
    (SecureError, "secure"),
    (LayoutDiffers, "layout"),
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
