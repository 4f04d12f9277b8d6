"""A YAML file that is no part of ``conf/``: numbers as 1e-5 are numbers, and a key that stands twice is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedsb.core.errors import UserError


def read_yaml(path: Path) -> dict[str, Any]:
    """Return what a file holds, ``${oc.env:…}`` and other references resolved.

    Raises:
        UserError: it is no YAML, holds no keys, or refers to what is not there.
    """
    try:
        found = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException, OSError) as error:
        text = " ".join(str(error).replace(f' in "{path}",', "").split())[:200]  # PyYAML's messages have several lines
        raise UserError(f"'{path}' can't be read as YAML ({text}); correct it") from None
    if not isinstance(found, dict):
        raise UserError(f"'{path}' holds a list, and no keys")
    return {str(key): value for key, value in found.items()}
