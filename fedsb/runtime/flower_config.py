"""Flower's own configuration: the connections that ``flwr run`` and ``fedsb submit`` know by name."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsb.core.errors import UserError

EXAMPLE = '[superlink.my-federation] with address = "127.0.0.1:18000" and insecure = true, or root-certificates = "/path/to/ca.crt"'


def config_file() -> Path:
    """Return where the user's lies, whether it is there or not: ``$FLWR_HOME/config.toml``, by default in ``~/.flwr``."""
    return Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr") / "config.toml"


def connections(path: Path) -> dict[str, Any]:
    """Return its table of SuperLinks: a table for each name, and ``default``, which is one of the names.

    Raises:
        UserError: the file is not there, or can't be read.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("superlink", {})
    except FileNotFoundError:
        raise UserError(f"'{path}', where Flower keeps its federations, is not there; write into it: {EXAMPLE}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"'{path}', where Flower keeps its federations, can't be read: {' '.join(str(error).split())}") from None
    return table if isinstance(table, dict) else {}


def names_in(table: Mapping[str, Any]) -> list[str]:
    """Return the names of the connections."""
    return sorted(key for key, value in table.items() if isinstance(value, dict))
