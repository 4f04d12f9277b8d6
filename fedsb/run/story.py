"""The story of a run in its log, and the one line with which it ends before its time."""

from __future__ import annotations

import logging
import os
import platform
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from socket import gethostname

from safetensors import SafetensorError

from fedsb.config.schema import Config
from fedsb.core.disk import is_full, reason_of
from fedsb.core.errors import RunError, UserError
from fedsb.core.logs import IN_FILE_ALONE
from fedsb.core.signals import how_ended

LOG = logging.getLogger(__name__)
PACKAGES = ("fedsb", "flwr", "torch", "transformers", "opacus", "ray")


def how_to_go_on(folder: Path) -> str:
    """Return the command that goes on with a run; empty where it has not begun."""
    return f"go on with: fedsb run {shlex.quote(f'resume={folder}')}" if (folder / "config.yaml").is_file() else ""


@contextmanager
def ending_in_one_line(folder: Path) -> Iterator[None]:
    """Say how to go on with what is cut off inside the block, and make one line of what a disk refuses.

    Raises:
        RunError: a file could not be written or read: no room, no right, a damaged disk.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if hint := how_to_go_on(folder):
            error.add_note(hint)
        raise
    except BrokenPipeError:
        raise
    except (OSError, SafetensorError) as error:
        if not (reason := reason_of(error)):
            raise
        mend = "free some" if is_full(error) else "mend that"
        place = "" if getattr(error, "filename", None) else f" (in {folder})"
        raise RunError(f"{reason}{place}; {mend} and {how_to_go_on(folder) or 'begin the run again'}") from error


@contextmanager
def told(config: Config, folder: Path) -> Iterator[None]:
    """Log how a run begins, and how it ends."""
    for line in beginning(config):
        LOG.info(line)
    try:
        yield
    except (UserError, RunError) as error:
        LOG.error("the run stopped: %s", error, extra=IN_FILE_ALONE)
        raise
    except KeyboardInterrupt as error:
        LOG.error("%s; %s", how_ended(error), how_to_go_on(folder), extra=IN_FILE_ALONE)
        raise
    except Exception:
        LOG.exception("the run stopped", extra=IN_FILE_ALONE)
        raise
    LOG.info("finished: %s", folder)


def beginning(config: Config) -> Iterator[str]:
    """Yield what a reader of the log wants to know first: where and with what, and the main lines of the configuration."""
    yield f"run on {gethostname()}, process {os.getpid()}, Python {platform.python_version()}, {', '.join(map(_versioned, PACKAGES))}"
    c, f = config, config.federation
    yield f"method {c.method.name}, rank {c.adapter.rank}, start {c.init.kind}, model {c.model.name}, data {c.data.path or c.data.kind}"
    yield f"{f.num_clients} clients, fraction {f.fraction:g}, {f.num_rounds} rounds, partition {f.partition.kind}, seed {c.seed}"
    yield f"privacy {c.privacy.unit}, runtime {c.runtime.kind}, threads {c.runtime.threads}, stack {c.runtime.stack}, device {c.device}"
    if c.resume:
        yield f"goes on with the run in {c.resume}"


def _versioned(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:  # in the bundle that Flower runs
        return f"{package} ?"
