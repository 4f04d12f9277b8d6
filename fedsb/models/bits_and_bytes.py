"""The package bitsandbytes: whether it is installed, and how it is imported."""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

PIP = "pip install 'fedsb[quant]'"


def is_there() -> bool:
    """Tell whether bitsandbytes is installed."""
    return find_spec("bitsandbytes") is not None


def bitsandbytes(part: str) -> ModuleType:
    """Import a part of it, which takes seconds: ``functional``, ``optim``."""
    # On some processors it warns that a package is missing whose products nothing here uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    return import_module(f"bitsandbytes.{part}")
