"""Overrides that come from somebody else, before anything of them is composed: they set values of the configuration, and nothing more.

Hydra reads files and imports packages that overrides name (``hydra.searchpath``, an option with ``..``), and OmegaConf reads the
environment (``${oc.env:…}``). On a real node none of that is the server's to say.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedsb.config.explaining import groups
from fedsb.core.errors import UserError

MOST = 2**16  # characters of all overrides
_PLAIN = re.compile(r"\$\{(fedsb_\w+:|[A-Za-z_][\w.]*\})")  # the project's own functions, and other keys
_OPTION = re.compile(r"[\w-]*|\{.*\}", re.DOTALL)


def check_foreign(overrides: Sequence[str]) -> None:
    """Hold overrides of a message against what a server may say.

    Raises:
        UserError: one names Hydra's own keys, a file outside of the groups, or a function that is not the project's.
    """
    if sum(map(len, overrides)) > MOST:
        raise UserError(f"the overrides have more than {MOST:,} characters; name what a run needs")
    for text in overrides:
        key, _, value = text.lstrip("+~").partition("=")
        key = key.partition("@")[0].strip()
        if re.split(r"[./]", key)[0] in ("hydra", "defaults"):
            raise UserError(f"{key[:40]}: a server may set nothing of Hydra's own at a node; leave it out")
        if key in groups() and not _OPTION.fullmatch(value.strip().strip("'\"")):
            raise UserError(f"{key}={value[:40]} names none of the files of {key}/; choose one of them")
        if len(_PLAIN.findall(value)) != value.count("${"):
            raise UserError(f"{key[:40]}: a server may refer to keys and to fedsb's functions alone; write the value out")
