"""What stands in the folder of a job, and what becomes of one that is damaged: it is set aside, and nothing of it is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from fedsb.config.schema import Config
from fedsb.core.errors import RunError, UserError
from fedsb.run.checkpoint import load_checkpoint
from fedsb.run.folder import RunFolder, records_in
from fedsb.run.resuming import differences, fingerprint, unsealed

NEW, CUT, FINISHED = "new", "cut", "finished"


class DamagedJobError(ValueError):
    """What lies in a job's folder is not what a run leaves there."""


def state_of(folder: Path, config: Config) -> str:
    """Return what stands in a job's folder: nothing yet, a run that was cut off, or one that has finished.

    Args:
        folder: of the job.
        config: of the job, its paths absolute and its clients named.

    Raises:
        UserError: it holds a run of another configuration.
        DamagedJobError: it holds a run that can neither go on nor be taken for finished.
    """
    run = RunFolder(folder, resumed=True)
    if not run.config.is_file():
        if run.summary.is_file() or run.metrics.is_file():
            raise DamagedJobError("config.yaml is missing")
        return NEW
    try:
        stored = unsealed(run.config)
    except UserError as error:
        raise DamagedJobError(str(error)) from None
    if differ := differences(config, stored):
        shown = ", ".join(f"{key}={there} there, {here} here" for key, (here, there) in list(differ.items())[:3])
        raise UserError(f"'{folder}' holds a job of another sweep ({shown}); choose another output=…")
    return _finished(run) if run.summary.is_file() else _cut(run, config)


def _finished(run: RunFolder) -> str:
    with _damages():
        summary = json.loads(run.summary.read_text(encoding="utf-8"))
        if [record.round for record in records_in(run.metrics)][-1:] != [summary.get("rounds_done", summary["rounds"])]:
            raise DamagedJobError("metrics.jsonl does not end with the last round")
    return FINISHED


def _cut(run: RunFolder, config: Config) -> str:
    with _damages():
        records_in(run.metrics)
        with suppress(FileNotFoundError):  # before its first checkpoint: it begins anew
            load_checkpoint(run.checkpoints, run=fingerprint(config))
    return CUT


@contextmanager
def _damages() -> Iterator[None]:
    """Take what a file of a run is not as damage of its folder."""
    try:
        yield
    except DamagedJobError:
        raise
    except (RunError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedJobError(f"{type(error).__name__}: {error}" if type(error) in (KeyError, TypeError) else str(error)) from None


def set_aside(folder: Path, config: Config, error: DamagedJobError) -> str:
    """Move the damaged folder of a job away, to run the job again, and return a line that says so.

    Raises:
        UserError: it is a private run's, whose ledger counts.
    """
    reason = " ".join(str(error).split())[:160]
    if config.privacy.unit != "none":
        raise UserError(f"'{folder}' is damaged ({reason}), and its ledger counts: restore it, or move it away to run that job again")
    place = next(free for n in count(1) if not (free := folder.with_name(f"{folder.name}.damaged-{n}")).exists())
    folder.rename(place)
    return f"'{folder}' is damaged ({reason}): it is set aside as '{place.name}', and the job runs again"


def metrics_of(folder: Path) -> dict[str, float | None]:
    """Return the last metrics of a finished job; none of another one, or of one that cannot be read."""
    try:
        found: dict[str, float | None] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["metrics"]
    except (OSError, ValueError, KeyError):
        return {}
    return found
