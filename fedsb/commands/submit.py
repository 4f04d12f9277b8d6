"""``fedsb submit``: a run on the SuperLink of a real federation, watched to its end."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fedsb.commands.outcome import DONE, FAILED
from fedsb.config.schema import Config
from fedsb.core.errors import UserError, nearest
from fedsb.core.logs import say_early
from fedsb.runtime.connection import Connection, FlowerError, RunStatus, flower_environment
from fedsb.runtime.flower_config import EXAMPLE, config_file, connections, names_in
from fedsb.runtime.staging import stage_app

SILENT = "No heartbeat"  # as Flower's details begin where a ServerApp has fallen silent


class Federation(NamedTuple):
    """A connection of Flower's configuration, and the folder of that where it is not the user's own."""

    name: str
    address: str
    home: Path | None = None


def submit(arguments: Sequence[str]) -> int:
    """Submit a run to a federation, show what it prints, and tell by the exit status how it ended.

    Raises:
        UserError: there is no such federation, its SuperLink does not take the run, or the overrides make no configuration.
        KeyboardInterrupt: a signal came; the run goes on, and a note says how to end it.
    """
    from fedsb.config.compose import load

    named, overrides = read_arguments(arguments)
    config = load(overrides)
    federation = chosen(named)
    # The caller's folder: a SuperLink that Flower starts for this run stays there, and relative paths mean it.
    connection = Connection(federation.name, environment=flower_environment(federation.home), folder=Path.cwd())
    run_id = _submitted(connection, federation, overrides)
    say_early(f"run {run_id} begins on {federation.name} ({federation.address})", progress=config.progress)
    try:
        status = connection.follow(run_id, lambda line: print(line, flush=True))
    except KeyboardInterrupt as error:
        flwr = f"FLWR_HOME={federation.home} flwr" if federation.home else "flwr"
        commands = (f"'{flwr} log {run_id} {federation.name}' shows it", f"'{flwr} stop {run_id} {federation.name}' ends it")
        error.add_note(f"run {run_id} goes on: {', '.join(commands)}")
        raise
    except FlowerError as error:
        return _failed(f"how run {run_id} stands is not known any more: {error}")
    return DONE if status.state == "completed" else _failed(ending(run_id, status, config))


def read_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the federation that is named, if one is, and the overrides.

    Raises:
        UserError: there are flags.
    """
    for flag in (argument for argument in arguments if argument.startswith("-")):
        raise UserError(f"fedsb submit takes no flag '{flag}': name a federation and KEY=VALUE …; it always shows the run's output")
    named = bool(arguments) and "=" not in arguments[0] and not arguments[0].startswith("~")
    return (arguments[0], list(arguments[1:])) if named else (None, list(arguments))


def chosen(name: str | None) -> Federation:
    """Return the connection of Flower's configuration that is named, or its default; that of a server's folder where one is named.

    Raises:
        UserError: there is none, or the configuration can't be read.
    """
    home = None if name is None else Path(name).expanduser().absolute() / "flower"
    if home is not None and (home / "config.toml").is_file():
        return _of(home / "config.toml", None)._replace(home=home)
    return _of(config_file(), name)


def _of(path: Path, name: str | None) -> Federation:
    table = connections(path)
    names = names_in(table)
    name = table.get("default") if name is None else name
    if not names:
        raise UserError(f"'{path}' names no federation; write into it: {EXAMPLE}")
    if name is None:
        raise UserError(f"no federation is given, and '{path}' has no default; choose from {', '.join(names)}")
    if name not in names:
        raise UserError(f"unknown federation '{name}'{nearest(str(name), names)}; '{path}' has {', '.join(names)}")
    return Federation(name, str(table[name].get("address", "")))


def ending(run_id: int, status: RunStatus, config: Config) -> str:
    """Say in one line how a run ended that was not completed."""
    line = f"run {run_id} {'was stopped' if status.state == 'stopped' else 'failed'}"
    if not status.details.startswith(SILENT):
        return f"{line}: {' '.join(status.details.split())}" if status.details else line
    folder = config.resume or config.output or f"<FEDSB_HOME of the SuperLink>/runs/{run_id}"
    return f"{line}: its ServerApp was killed, or its machine went down ({status.details}); go on with resume={folder}"


def _submitted(connection: Connection, federation: Federation, overrides: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="fedsb-") as folder:
        try:
            return connection.submit(stage_app(Path(folder)), overrides)
        except FlowerError as error:
            raise UserError(f"{federation.name} ({federation.address}) takes no run: {error}") from None
        except KeyboardInterrupt as error:
            home = f"FLWR_HOME={federation.home} " if federation.home else ""
            error.add_note(f"'{home}flwr list {federation.name}' tells whether the run has begun")
            raise


def _failed(line: str) -> int:
    print(f"error: {line}", file=sys.stderr)
    return FAILED
