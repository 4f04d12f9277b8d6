"""How a configuration is composed: Hydra reads ``conf/`` and overrides, OmegaConf types them, :mod:`fedsb.config.checks` checks the values.

The command line, the ServerApp and the ClientApp all call :func:`load` with the same override strings, so they cannot drift.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from yaml import YAMLError

from fedsb.adapters import SPECS
from fedsb.config.checks import check
from fedsb.config.derived import partition_kind, start_kind
from fedsb.config.explaining import explained, explained_value, groups
from fedsb.config.overrides import check_single, readable
from fedsb.config.schema import Config
from fedsb.config.settings import POOLED, laid_out
from fedsb.config.trees import composed
from fedsb.core.errors import UserError, unknown
from fedsb.core.folders import conf_dir

SHORT, LENGTHS = 48, {"causal_lm": 512}  # tokens of an example, by task


def default_output(output: str | None, resume: str | None) -> str:
    """Return the folder of a resumed run, else ``output``, else ``outputs/<date>/<time>``."""
    return resume or output or datetime.now().strftime("outputs/%Y-%m-%d/%H-%M-%S")


def default_sweep(output: str | None) -> str:
    """Return ``output`` as the folder of a sweep, or ``multirun/<date>/<time>``; each job has a folder below it."""
    return output or datetime.now().strftime("multirun/%Y-%m-%d/%H-%M-%S")


def default_clients(names: Sequence[str] | None, partition: str | None, otherwise: int) -> int:
    """Return the number of clients where none is given: one a name; 0 where the data tell (``partition.kind=natural``)."""
    if names:
        return len(names)
    return 0 if partition == "natural" else otherwise


def default_rounds(adapter: str, otherwise: int) -> int:
    """Return the number of rounds where none is given: at least one for each turn of an adapter family's factors."""
    return max(otherwise, SPECS[adapter].turns) if adapter in SPECS else otherwise


def default_rank(ranks: Sequence[int] | None, otherwise: int) -> int:
    """Return the rank where none is given: the largest of the clients' own, or that of the method."""
    numbers = [rank for rank in ranks if isinstance(rank, int)] if isinstance(ranks, Sequence) and not isinstance(ranks, str) else []
    return max(numbers, default=otherwise)


def default_pair_alpha(rank: int, first: int | None) -> float:
    """Return ABBA's alpha where none is given: s = alpha / r is √(r1 r2) then, where its paper's formula and its code agree."""
    r1 = rank // 2 if first is None else first
    return float(rank * max(1, r1 * (rank - r1)) ** 0.5) if isinstance(r1, int) else 1.0


def default_text(*others: str | None) -> str | None:
    """Return the column of texts where none is given: ``text``, and none where examples are given in another way."""
    return None if any(other is not None for other in others) else "text"


def default_length(model_task: str | None, data_task: str | None) -> int:
    """Return how many tokens an example keeps where nothing is said: as many as suit the task."""
    return LENGTHS.get(model_task or data_task or "", SHORT)


OmegaConf.register_new_resolver("fedsb_rank", default_rank, replace=True)
OmegaConf.register_new_resolver("fedsb_pair_alpha", default_pair_alpha, replace=True)
OmegaConf.register_new_resolver("fedsb_text", default_text, replace=True)
OmegaConf.register_new_resolver("fedsb_length", default_length, replace=True)
OmegaConf.register_new_resolver("fedsb_clients", default_clients, replace=True)
OmegaConf.register_new_resolver("fedsb_rounds", default_rounds, replace=True)


def free_start(adapter: str, wanted: str | None = None) -> str | None:
    """Return a start of an adapter family that looks at no data, ``wanted`` if it has it; None where there is nothing to start."""
    starts = SPECS[adapter].starts if adapter in SPECS else {}
    free = [kind for kind, start in starts.items() if start is not None]
    return wanted if wanted in free else next(iter(free), None)


OmegaConf.register_new_resolver("fedsb_free_start", free_start, replace=True)
OmegaConf.register_new_resolver("fedsb_sweep", default_sweep, use_cache=True, replace=True)
OmegaConf.register_new_resolver("fedsb_output", default_output, use_cache=True, replace=True)


def split_overrides(text: str) -> list[str]:
    """Split the one string of ``flwr run --run-config 'overrides="…"'`` as a shell would.

    Raises:
        UserError: a quote is not closed.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"cannot read the overrides '{text}': {error}") from None


def load(overrides: Sequence[str] = ()) -> Config:
    """Compose, type and check a configuration, once for equal overrides: the command line, server and simulated clients ask in turn.

    Raises:
        UserError: an unknown group option, key or value; the message is one line with the nearest match.
    """
    return _loaded(tuple(overrides))


@lru_cache(maxsize=32)
def _loaded(overrides: tuple[str, ...]) -> Config:
    return typed(compose_dict(overrides))


def compose_dict(overrides: Sequence[str]) -> DictConfig:
    """Compose ``conf/config.yaml`` with overrides.

    Raises:
        UserError: see :func:`load`.
    """
    overrides = [readable(text) for text in overrides]
    check_single(overrides)
    _check_groups(overrides)
    try:
        return composed(conf_dir(), overrides, groups())
    except (HydraException, OmegaConfBaseException) as error:
        raise explained(error, overrides) from None


def composed_yaml(overrides: Sequence[str]) -> str:
    """Return what ``conf/config.yaml`` and overrides make, as YAML, its references as they are written.

    Raises:
        UserError: see :func:`load`.
    """
    return OmegaConf.to_yaml(compose_dict(overrides))


def _check_groups(overrides: Sequence[str]) -> None:
    for text in overrides:
        key, _, value = text.lstrip("+").partition("=")
        if not value and key in groups() and not text.startswith("~"):
            options = sorted(path.stem for path in (conf_dir() / key).glob("*.yaml"))
            raise UserError(f"{key}= names none of its files; choose from {', '.join(options)}")


def typed(composed: DictConfig) -> Config:
    """Turn a composed tree into checked dataclasses.

    Raises:
        UserError: see :func:`load`.
    """
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        config = TypeAdapter(Config).validate_python(plain)
    except OmegaConfBaseException as error:
        raise explained(error, ()) from None
    except ValidationError as error:
        raise explained_value(error) from None
    _check_method(config)
    check(config)
    partition = replace(config.federation.partition, kind=partition_kind(config))
    return laid_out(
        replace(
            config,
            init=replace(config.init, kind=start_kind(config)),
            federation=replace(config.federation, partition=partition),
        )
    )


def _check_method(config: Config) -> None:
    """Hold the method's name and adapter against its YAML file: a method is that pair.

    Raises:
        UserError: no such method, or another adapter.
    """
    methods = {path.stem: path for path in (conf_dir() / "method").glob("*.yaml")}
    if config.method.name not in methods:
        raise unknown("method", config.method.name, methods)
    said = cast(DictConfig, OmegaConf.load(methods[config.method.name]))
    own = said.get("method", said)  # one that brings defaults of other groups names its own
    adapter = own.adapter
    if config.method.setting != own.setting:
        raise UserError(f"method.setting={config.method.setting} is not that of method '{config.method.name}'; it must be {own.setting}")
    if config.method.setting == POOLED:
        # The mean of one client's factors is what it trained, whatever the family, if it sends all of them.
        roles = SPECS[config.method.adapter].roles if config.method.adapter in SPECS else ()
        if part := next((role.name for role in roles if role.kept_by != "server"), None):
            raise UserError(f"method.adapter={config.method.adapter} with method={config.method.name}: nobody would keep its {part}")
        if config.method.adapter in SPECS and SPECS[config.method.adapter].sketch is not None:
            raise UserError(
                f"method.adapter={config.method.adapter} with method={config.method.name}: its sketches are there for the products of many "
                "clients, and one client can send its factors; use method.adapter=lora"
            )
    elif config.method.adapter != adapter:
        raise UserError(f"method.adapter={config.method.adapter} is not that of method '{config.method.name}'; it must be {adapter}")


def as_dict(config: Any) -> dict[str, Any]:
    """Return a configuration (or a part) as plain containers."""
    return json.loads(json.dumps(dataclasses.asdict(config)))  # type: ignore[no-any-return]


def read(path: Path, changes: Sequence[str] = ()) -> Config:
    """Read back what :func:`as_yaml` wrote; keys that an earlier version did not have yet take their defaults.

    Args:
        path: of the file.
        changes: what is to be otherwise, as ``eval.every=2``.

    Raises:
        UserError: the file is cut off, or holds something else; or a change is none.
    """
    defaults = OmegaConf.create(OmegaConf.to_container(compose_dict([]), resolve=True))
    try:
        stored = cast(DictConfig, OmegaConf.merge(defaults, OmegaConf.load(path)))
        config = typed(stored)
    except (UserError, YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        # PyYAML's messages have several lines, and the path in each.
        text = " ".join(str(error).replace(f' in "{path}",', "").split())
        raise UserError(f"'{path}' can't be read as a run's configuration ({text}); restore the file") from None
    return _changed(stored, changes) if changes else config


def _changed(stored: DictConfig, changes: Sequence[str]) -> Config:
    try:
        return typed(cast(DictConfig, OmegaConf.merge(stored, OmegaConf.from_dotlist(list(changes)))))
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{' '.join(changes)} can't be read ({' '.join(str(error).split())[:120]})") from None


def as_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(as_dict(config)))
