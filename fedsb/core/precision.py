"""Mixed precision where there is one: a tensor of a shape alone (meta) has none that could be on, or be left."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def is_mixed(x: Tensor) -> bool:
    """Tell whether what is computed with a tensor is computed in mixed precision."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def as_it_is(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which what is computed with a tensor is computed in its own dtype."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
