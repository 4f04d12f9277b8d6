"""``fedsb run``: one federation, or with ``-m`` one for each point of a grid."""

from __future__ import annotations

import itertools
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig

from fedsb.commands.outcome import INTERRUPTED, guarded
from fedsb.errors import UserError
from fedsb.folders import check_makeable
from fedsb.logs import say_early, speaking_to
from fedsb.schema import Config
from fedsb.sweep import CUT, NEW, Ending, Job, endings, going_on, label_jobs, run_noted, state_of, tell

SWEEP = ("-m", "--multirun")
FLAGS_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")


def run(arguments: list[str]) -> int:
    """Run one federation, or with ``-m`` one for each combination of the swept values."""
    overrides = overrides_in(arguments)
    if any(flag in arguments for flag in SWEEP):
        return run_sweep(arguments, label_jobs(sweep_jobs(overrides)))
    check_job(overrides)
    statuses: list[int] = []

    def job_main(composed: DictConfig) -> None:
        statuses.append(guarded(lambda: _run_afresh(composed)))

    _through_hydra([*flags_in(arguments), *overrides], job_main)
    return max(statuses, default=0)


def check_job(overrides: Sequence[str], sweep: Path | None = None, number: int = 0) -> Config:
    """Return a job's configuration, once nothing is known that would end it before its time.

    Raises:
        UserError: a mistake in what was given.
    """
    from fedsb.assembly import anchored, peopled
    from fedsb.config import load
    from fedsb.resuming import resumed

    config = load(overrides)
    check_makeable(Path(config.output or "outputs").expanduser(), f"output={config.output}" if config.output else "outputs")
    if config.resume:
        resumed(peopled(anchored(config, Path.cwd())), overrides)
    elif sweep is not None and (sweep / str(number)).is_dir():
        state_of(sweep / str(number), peopled(anchored(config, Path.cwd())))
    return config


def run_sweep(arguments: list[str], jobs: tuple[Job, ...]) -> int:
    """Run the jobs of a sweep that have not finished, each in a folder below that of the sweep; all are checked before the first runs."""
    from fedsb.config import default_sweep

    given = dict(text.split("=", 1) for text in overrides_in(arguments) if text.startswith(("output=", "hydra.sweep.dir=")))
    output = given.get("hydra.sweep.dir", given.get("output"))
    folder = Path(default_sweep(output and output.strip("'\"")))
    checked = [check_job(job.overrides, folder, job.number) for job in jobs]

    def job_main(composed: DictConfig) -> None:
        if _run_of_sweep(composed, folder, jobs).status == INTERRUPTED:
            raise SystemExit(INTERRUPTED)  # and no other job of the sweep

    try:
        _through_hydra([*flags_in(arguments), *overrides_in(arguments), f"hydra.sweep.dir='{folder}'"], job_main, sweep=True)
    finally:
        with speaking_to(people=_to_people()):
            tell(folder, jobs, arguments, progress=checked[0].progress)
    return max((ending.status for ending in endings(folder).values()), default=0)


def _through_hydra(arguments: Sequence[str], job_main: Callable[[DictConfig], None], *, sweep: bool = False) -> None:
    import hydra
    from hydra.core.utils import env_override

    from fedsb.config import ROOT, conf_dir

    argv = sys.argv
    # Hydra's parser takes flags in front of overrides, or behind them, but not in between.
    sys.argv = ["fedsb", *arguments]
    try:
        # In a sweep Hydra is to hand on what a job has raised, and not to print it and exit.
        with env_override({"HYDRA_FULL_ERROR": "1"} if sweep else {}):
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=ROOT)(job_main)()
    finally:
        sys.argv = argv


def _run_of_sweep(composed: DictConfig, sweep: Path, jobs: tuple[Job, ...]) -> Ending:
    """Run one job of a sweep, go on with it, or leave it as it is; in this process or in a launcher's."""
    from hydra.core.hydra_config import HydraConfig

    from fedsb.assembly import anchored, peopled
    from fedsb.config import load, typed

    job, folder = jobs[HydraConfig.get().job.num], Path(HydraConfig.get().runtime.output_dir)
    given = peopled(anchored(typed(composed), Path.cwd()))
    state = NEW if given.resume else state_of(folder, given)

    def go() -> None:
        if state != CUT:
            _run_afresh(composed)
            return
        again = going_on(job.overrides, folder.absolute())
        run_job(peopled(anchored(load(again), Path.cwd())), again, folder)

    with speaking_to(people=_to_people()):
        return run_noted(sweep, job, len(jobs), state, go, progress=given.progress)


def _run_afresh(composed: DictConfig) -> int:
    """Run a job in the folder that Hydra made for it, and leave none where there was a mistake in what was given."""
    from hydra.core.hydra_config import HydraConfig

    from fedsb.assembly import anchored, peopled
    from fedsb.config import typed

    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        return run_job(peopled(anchored(typed(composed), Path.cwd())), list(HydraConfig.get().overrides.task), folder)
    except UserError:
        _forget_folder(folder)
        raise


def _forget_folder(folder: Path) -> None:
    """Remove a folder that Hydra made before anyone had looked at what was asked for, and that of its date."""
    with suppress(OSError):
        folder.rmdir()
        if folder.parent.parent.name in ("outputs", "multirun"):
            folder.parent.rmdir()


def overrides_in(arguments: Sequence[str]) -> list[str]:
    """Return the overrides among Hydra's arguments: what is neither a flag nor the value of one."""
    return [a for a, is_flag in _marked(arguments) if not is_flag]


def flags_in(arguments: Sequence[str]) -> list[str]:
    """Return the flags among Hydra's arguments, each with its value."""
    return [a for a, is_flag in _marked(arguments) if is_flag]


def _marked(arguments: Sequence[str]) -> list[tuple[str, bool]]:
    values = [i + 1 for i, argument in enumerate(arguments) if argument in FLAGS_WITH_VALUE]
    return [(a, a.startswith("-") or i in values) for i, a in enumerate(arguments)]


def sweep_jobs(overrides: Sequence[str]) -> list[list[str]]:
    """Expand ``a=1,2 b=3`` into one list of overrides a job, so that all are checked before the first runs.

    Raises:
        UserError: an override that Hydra cannot parse.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    choices: list[list[str]] = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise UserError(f"cannot read '{text}': {' '.join(str(error).split())[:120]}") from None
        key = override.get_key_element()
        try:
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()] if override.is_sweep_override() else [text])
        except HydraException as error:
            raise UserError(f"cannot sweep over '{text}': name the values, as in {key}=a,b ({' '.join(str(error).split())[:80]})") from None
    return [list(job) for job in itertools.product(*choices)]


def run_job(given: Config, overrides: list[str], output: Path) -> int:
    """Run one federation in this process, or go on with the one that ``given.resume`` names.

    Args:
        given: the configuration, its paths absolute and its clients named.
        overrides: that it was composed from.
        output: folder of a run that begins.
    """
    with speaking_to(people=_to_people()):
        return _run_job(given, overrides, output)


def _to_people() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def _run_job(given: Config, overrides: list[str], output: Path) -> int:
    from fedsb.resuming import resumed

    config = resumed(given, overrides)
    say_early("loading model and data …", progress=config.progress)
    _quieten()
    from fedsb.runtime.grids import grid_for
    from fedsb.server_app import serve

    _log_to_screen()
    folder = Path(config.resume or output)
    grid = grid_for(config, {"overrides": shlex.join(overrides), "output": str(folder)})
    try:
        serve(config, grid, folder, overrides=overrides)
    except KeyboardInterrupt:
        if (folder / "checkpoints").is_dir():
            print(f"go on with: fedsb run {shlex.quote(f'resume={folder}')}", file=sys.stderr)
        raise
    finally:
        grid.close()
    return 0


def _quieten() -> None:
    """Switch off what libraries fetch or say on their own."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"transformers|torch")


def _log_to_screen() -> None:
    """Send warnings to standard error; the run's folder has the whole log."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    screen = logging.StreamHandler()
    screen.setLevel(logging.WARNING)
    screen.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root.addHandler(screen)
