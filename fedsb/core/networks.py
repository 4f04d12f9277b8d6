"""Where a process has its base networks from: it loads them, or another process holds them already.

Apart from what loads them: whoever only hands them on need not import transformers.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

NetworkSource = Callable[[str, Callable[[], nn.Module]], nn.Module]
_source: NetworkSource | None = None


def use_networks(source: NetworkSource | None) -> None:
    """Let this process take its networks from ``source(key, load)``, which may have them already; None loads each anew.

    What a source returns may share memory with other processes: nobody writes to its tensors in place.
    """
    global _source
    _source = source


def network_of(key: str, load: Callable[[], nn.Module]) -> nn.Module:
    """Return the network that a key names, from the source in use, or by ``load``."""
    return load() if _source is None else _source(key, load)
