"""An operator's words as a :class:`NodeConfig`: a YAML file that ``--node-config`` names, or pairs that stand there themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedsb.core.errors import nearest
from fedsb.node.file import read_file, said_in
from fedsb.node.settings import PACKAGE, NodeConfig, OwnData, OwnPrivacy
from fedsb.node.values import NodeConfigError, hold

SIMULATED = frozenset({"partition-id", "num-partitions"})  # what Flower's simulation tells a node
FILE = "file"  # the one key of --node-config where node.yaml says all
WHERE = "in --node-config"


def _word(value: Any) -> Any:
    return value if isinstance(value, bool | float) else str(value).strip() or value


def _number(value: Any) -> Any:
    try:
        return value if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return value


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


# key of --node-config -> key of node.yaml, and how it is read: Flower gives strings or numbers.
PAIRS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "client": ("client", _word),
    "data-path": ("data.path", _word),
    "privacy": ("privacy.unit", _word),
    "max-epsilon": ("privacy.max_epsilon", _number),
    "max-delta": ("privacy.max_delta", _number),
    "min-noise": ("privacy.min_noise", _number),
    "ledger": ("privacy.ledger", _word),
    "rank": ("rank", _whole),
}
SPELLING = {key: pair for pair, (key, _) in PAIRS.items()}


def is_operated(node_config: Mapping[str, Any]) -> bool:
    """Tell whether a node is one of a real federation, which its operator starts: whatever is not told what a simulated one is told."""
    return not node_config or not node_config.keys() <= SIMULATED


def read_node(node_config: Mapping[str, Any]) -> NodeConfig | None:
    """Read what an operator has said; None of a simulated node, which nobody has told anything.

    Args:
        node_config: strings or numbers by key, as ``--node-config`` gives them.

    Raises:
        NodeConfigError: an unknown key, a value that cannot be read, one that is missing, or a file that is not there.
    """
    if not is_operated(node_config):
        return None
    if FILE not in node_config:
        return _of_pairs(node_config)
    if beside := sorted(node_config.keys() - {FILE}):
        raise NodeConfigError(f"--node-config has {', '.join(beside)} beside {FILE}; write into that file what they say", key=FILE)
    return read_file(_place(node_config[FILE]))


def name_of(node_config: Mapping[str, Any]) -> str:
    """Return whom a node says that it serves, also where the rest of what it says cannot be used; nothing where it doesn't say."""
    if FILE not in node_config:
        return str(node_config.get("client", ""))
    try:
        return str(said_in(_place(node_config[FILE])).get("client", ""))
    except NodeConfigError:
        return ""


def _place(value: Any) -> Path:
    path = Path(str(value)).expanduser()
    if not path.is_absolute():
        raise NodeConfigError(f"{FILE}={value!r} {WHERE} must begin at the root, as /etc/fedsb/node.yaml does", key=FILE)
    return path


def _of_pairs(node_config: Mapping[str, Any]) -> NodeConfig:
    for key in node_config:
        if key not in PAIRS:
            raise NodeConfigError(f"--node-config has the key '{key}'{nearest(key, [*PAIRS, FILE])}; known: {', '.join([FILE, *PAIRS])}")
    said = {PAIRS[key][0]: PAIRS[key][1](value) for key, value in node_config.items()}
    hold(said, WHERE, SPELLING, {PAIRS[key][0]: value for key, value in node_config.items()})
    if "client" not in said:
        raise NodeConfigError('this node names no client; start it with --node-config \'client="…" data-path="…"\'', key="client")
    if "data.path" not in said:
        raise NodeConfigError(
            f'this node has no data-path; give its data as data-path="…", or data-path="{PACKAGE}" for those of an installed package',
            key="data-path",
        )
    privacy = {key.removeprefix("privacy."): value for key, value in said.items() if key.startswith("privacy.")}
    return NodeConfig(said["client"], OwnData(said["data.path"]), said.get("rank"), privacy=OwnPrivacy(**privacy))
