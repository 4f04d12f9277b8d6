"""What the operator of a node allows: read from ``--node-config`` and held against what a run asks for, before any data are read.

A run's configuration comes from the server; what stands here does not. It stops a server that forgot ``privacy=…`` or asks for too much, as
long as the app that the server ships is this one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedsb.config.schema import Config
from fedsb.core.errors import UserError, nearest
from fedsb.privacy.limit import Limit

SIMULATED = frozenset({"partition-id", "num-partitions"})  # what Flower's simulation tells a node
PACKAGE = "package"  # the data-path of a node whose data ship in a package
PACKAGED = "bbc_news"
UNIT = "example"  # the only privacy that a node can ask for: under privacy=client it has to trust the server


class NodeConfigError(UserError):
    """A node's own configuration cannot be used: nothing is answered before its operator has corrected it."""


class PolicyError(UserError):
    """A run asks for what the operator of a node does not allow."""


@dataclass(frozen=True)
class NodePolicy:
    """What an operator has said of a node.

    Attributes:
        client: the client that it serves.
        data_path: the client's own data; None where they ship in a package.
        privacy: the only unit of privacy that is answered; None answers every run.
        max_epsilon: the budget over the whole ledger, beside the run's own.
        max_delta: the largest δ at which that budget is judged.
        min_noise: the smallest noise multiplier of a release.
        ledger: a name for the ledger in place of where the data lie.
        rank: of the client's factors, where the run gives it none and its method takes clients of several.
    """

    client: str
    data_path: str | None
    privacy: str | None = None
    max_epsilon: float | None = None
    max_delta: float | None = None
    min_noise: float | None = None
    ledger: str | None = None
    rank: int | None = None

    def admit(self, config: Config, *, unnoised: str | None) -> None:
        """Hold a run's configuration against the policy.

        Args:
            config: of the run.
            unnoised: why the run's start has no noise; None where it has, or needs none.

        Raises:
            PolicyError: the operator does not allow it.
        """
        if self.data_path is None and config.data.kind != PACKAGED:
            raise PolicyError(f"data.kind={config.data.kind}: this node's data-path is '{PACKAGE}', so it serves data={PACKAGED} alone")
        if self.data_path is None:
            _hold_pathless(config)
        if self.privacy is None:
            return
        if config.privacy.unit != self.privacy:
            raise PolicyError(f"privacy.unit={config.privacy.unit}: this node answers privacy={self.privacy} alone")
        if unnoised is not None:
            raise PolicyError(f"privacy.init_fraction={config.privacy.init_fraction:g}: this node gives nothing without noise ({unnoised})")
        self.admit_noise(config.privacy.noise_multiplier)

    def limit(self, delta: float) -> Limit | None:
        """Return the operator's budget in a run whose δ is ``delta``: judged there, or at ``max-delta`` where that is smaller."""
        return None if self.max_epsilon is None else Limit(self.max_epsilon, min(delta, self.max_delta or delta), "max-epsilon")

    def admit_noise(self, *multipliers: float | None) -> None:
        """Hold noise multipliers, those that are known, against the least that the operator allows.

        Raises:
            PolicyError: one is smaller.
        """
        least = min((noise for noise in multipliers if noise is not None), default=math.inf)
        if self.min_noise is not None and least < self.min_noise:
            raise PolicyError(f"privacy.noise_multiplier={least:g}: this node's min-noise is {self.min_noise:g}")


def _hold_pathless(config: Config) -> None:
    """Hold that a run names no file: a node would read it from its own disk, and tell by its answer what it holds."""
    for key in ("path", "test_path", "public_path"):
        if getattr(config.data, key) is not None:
            raise PolicyError(f"data.{key}: this node's data-path is '{PACKAGE}', and it reads no other; leave data.{key} out")


def _word(key: str, value: Any) -> str:
    text = str(value).strip()
    if not text or isinstance(value, (bool, float)):
        raise NodeConfigError(f'{key}={value!r} in --node-config is no name; give one, as in {key}="…"', key=key)
    return text


def _unit(key: str, value: Any) -> str:
    if value != UNIT:
        raise NodeConfigError(f'{key}={value!r} in --node-config is not known; give {key}="{UNIT}", or leave it out', key=key)
    return UNIT


def _number(most: float, allowed: str) -> Callable[[str, Any], float]:
    def read(key: str, value: Any) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 < number < most:
            raise NodeConfigError(f"{key}={value!r} in --node-config is out of range; it must be {allowed}", key=key)
        return number

    return read


def _ledger(key: str, value: Any) -> str:
    name = _word(key, value)
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,48}", name):
        raise NodeConfigError(f"{key}={value!r} in --node-config must be at most 48 letters, digits, '-' and '_'", key=key)
    return name


def _rank(key: str, value: Any) -> int:
    if isinstance(value, (bool, float)) or not re.fullmatch(r"[1-9][0-9]{0,8}", str(value).strip()):
        raise NodeConfigError(f"{key}={value!r} in --node-config is no rank; it must be a whole number of at least 1", key=key)
    return int(value)


KEYS: Mapping[str, Callable[[str, Any], Any]] = {
    "client": _word,
    "data-path": _word,
    "privacy": _unit,
    "max-epsilon": _number(math.inf, "a number above 0"),
    "max-delta": _number(1.0, "between 0 and 1"),
    "min-noise": _number(math.inf, "a number above 0"),
    "ledger": _ledger,
    "rank": _rank,
}
# key -> the key without which it would have no effect.
NEEDS: Mapping[str, str] = {"max-epsilon": "privacy", "max-delta": "max-epsilon", "min-noise": "privacy"}


def is_operated(node_config: Mapping[str, Any]) -> bool:
    """Tell whether a node is one of a real federation, which its operator starts: whatever is not told what a simulated one is told."""
    return not node_config or not node_config.keys() <= SIMULATED


def read_policy(node_config: Mapping[str, Any]) -> NodePolicy | None:
    """Read what an operator has said; None of a simulated node, which nobody has told anything.

    Args:
        node_config: strings or numbers by key, as ``--node-config`` gives them.

    Raises:
        NodeConfigError: a key that is not in :data:`KEYS`, a value that cannot be read, or a key that is missing.
    """
    if not is_operated(node_config):
        return None
    for key in node_config:
        if key not in KEYS:
            raise NodeConfigError(f"--node-config has the key '{key}'{nearest(key, KEYS)}; known: {', '.join(KEYS)}")
    given = {key: KEYS[key](key, value) for key, value in node_config.items()}
    if "client" not in given:
        raise NodeConfigError('this node names no client; start it with --node-config \'client="…" data-path="…"\'', key="client")
    if "data-path" not in given:
        raise NodeConfigError(
            f'this node has no data-path; give its data as data-path="…", or data-path="{PACKAGE}" for those of an installed package',
            key="data-path",
        )
    for key, needed in NEEDS.items():
        if key in given and needed not in given:
            raise NodeConfigError(f"{key} in --node-config has no effect without {needed}; add {needed}, or leave {key} out", key=key)
    named = {key.replace("-", "_"): value for key, value in given.items()}
    return NodePolicy(**{**named, "data_path": None if named["data_path"] == PACKAGE else named["data_path"]})
