"""``fedsb run``: one federation, or with ``-m`` one for each point of a grid."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig

from fedsb.commands.flags import SHOWING, SWEEP, flags_in, has_flag, overrides_in
from fedsb.commands.outcome import by_signal, guarded
from fedsb.commands.sweep import CUT, NEW, Ending, Job, endings, going_on, label_jobs, run_noted, state_of, tell
from fedsb.config.overrides import readable, sweep_jobs
from fedsb.config.schema import Config
from fedsb.core.collector import uncollected
from fedsb.core.errors import UserError
from fedsb.core.folders import ROOT_CONFIG, check_makeable, claim, conf_dir, forget_empty, home
from fedsb.core.logs import log_to_screen, say_early, speaking_to
from fedsb.core.signals import heed_sigterm
from fedsb.runtime.early import switch_off


def run(arguments: list[str]) -> int:
    """Run one federation, or with ``-m`` one for each combination of the swept values."""
    from fedsb.config.compose import default_output

    flags, overrides = flags_in(arguments), [readable(text) for text in overrides_in(arguments)]
    if has_flag(flags, SWEEP):
        jobs = label_jobs(sweep_jobs(overrides))
        return show_sweep(flags, jobs) if has_flag(flags, SHOWING) else run_sweep([*flags, *overrides], jobs)
    config = check_job(overrides)
    statuses: list[int] = []

    def job_main(composed: DictConfig) -> None:
        statuses.append(guarded(lambda: _run_afresh(composed)))

    named = config.output or config.resume or has_flag(flags, SHOWING) or any(text.startswith("hydra.run.dir=") for text in overrides)
    folder = None if named else claim(Path(default_output(None, None)))
    try:
        _through_hydra([*flags, *overrides, *([f"hydra.run.dir='{folder}'"] if folder else [])], job_main)
    finally:
        if folder:
            forget_empty(folder)
    return max(statuses, default=0)


def show_sweep(flags: Sequence[str], jobs: Sequence[Job]) -> int:
    """Print the configuration of each job.

    Raises:
        UserError: another view of it is asked for.
    """
    from fedsb.config.compose import composed_yaml

    if not has_flag(flags, ("--cfg", "-c")) or not {"job", "--cfg=job"} & set(flags):
        raise UserError("with -m only --cfg job can be shown; leave -m out for the others")
    for job in jobs:
        print(f"# job {job.number + 1} of {len(jobs)}: {job.label}\n{composed_yaml(job.overrides)}")
    return 0


def check_job(overrides: Sequence[str], sweep: Path | None = None, number: int = 0) -> Config:
    """Return a job's configuration, once nothing is known that would end it before its time.

    Raises:
        UserError: a mistake in what was given.
    """
    with uncollected(for_good=True):
        from fedsb.app.anchoring import anchored
        from fedsb.app.assembly import peopled
        from fedsb.app.prepare import check_method
        from fedsb.config.compose import load
        from fedsb.run.resuming import resumed

    config = load(overrides)
    check_method(config)
    check_makeable(Path(config.output or "outputs").expanduser(), f"output={config.output}" if config.output else "outputs")
    if config.resume:
        resumed(peopled(anchored(config, Path.cwd())), overrides)
    elif sweep is not None and (sweep / str(number)).is_dir():
        state_of(sweep / str(number), peopled(anchored(config, Path.cwd())))
    return config


def run_sweep(arguments: list[str], jobs: tuple[Job, ...]) -> int:
    """Run the jobs of a sweep that have not finished, each in a folder below that of the sweep; all are checked before the first runs."""
    from fedsb.config.compose import default_sweep

    given = dict(text.split("=", 1) for text in overrides_in(arguments) if text.startswith(("output=", "hydra.sweep.dir=")))
    output = given.get("hydra.sweep.dir", given.get("output"))
    folder = Path(default_sweep(output and output.strip("'\"")))
    checked = [check_job(job.overrides, folder if output else None, job.number) for job in jobs]
    if output is None:
        folder = claim(folder)

    def job_main(composed: DictConfig) -> None:
        ending = _run_of_sweep(composed, folder, jobs)
        if by_signal(ending.status):
            raise SystemExit(ending.status)  # and no other job of the sweep

    try:
        _through_hydra([*flags_in(arguments), *overrides_in(arguments), f"hydra.sweep.dir='{folder}'"], job_main)
    finally:
        with speaking_to(people=_to_people()):
            tell(folder, jobs, arguments, progress=checked[0].progress)
    return max((ending.status for ending in endings(folder).values()), default=0)


def _through_hydra(arguments: Sequence[str], job_main: Callable[[DictConfig], None]) -> None:
    import hydra
    from hydra.core.utils import env_override

    argv = sys.argv
    # Hydra's parser takes flags in front of overrides, or behind them, but not in between.
    sys.argv = ["fedsb", *arguments]
    try:
        # Hydra is to hand on what is raised, and not to print it and exit.
        with env_override({"HYDRA_FULL_ERROR": "1"}):
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=ROOT_CONFIG)(job_main)()
    finally:
        sys.argv = argv


def _run_of_sweep(composed: DictConfig, sweep: Path, jobs: tuple[Job, ...]) -> Ending:
    """Run one job of a sweep, go on with it, or leave it as it is; in this process or in a launcher's."""
    from hydra.core.hydra_config import HydraConfig

    from fedsb.app.anchoring import anchored
    from fedsb.app.assembly import peopled
    from fedsb.config.compose import load, typed

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

    from fedsb.app.anchoring import anchored
    from fedsb.app.assembly import peopled
    from fedsb.config.compose import typed

    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        return run_job(peopled(anchored(typed(composed), Path.cwd())), list(HydraConfig.get().overrides.task), folder)
    except UserError:
        forget_empty(folder)
        raise


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
    from fedsb.run.resuming import resumed

    config = resumed(given, overrides)
    say_early("loading model and data …", progress=config.progress)
    switch_off()
    warnings.filterwarnings("ignore", category=UserWarning, module=r"transformers|torch")
    with uncollected(for_good=True):
        from fedsb.core.collector import release_memory
        from fedsb.runtime.grids import grid_for
        from fedsb.server_app import serve

    log_to_screen()
    folder = Path(config.resume or output)
    _check_home(config)
    grid = grid_for(config, {"overrides": shlex.join(overrides), "output": str(folder)})
    heed_sigterm()
    try:
        serve(config, grid, folder, overrides=overrides)
    finally:
        grid.close()
        del grid
        release_memory()
    return 0


def _check_home(config: Config) -> None:
    """Hold that what clients keep of the frozen log can be written, where the method has one.

    Raises:
        UserError: it can't.
    """
    from fedsb.config.derived import family, start_kind
    from strategies import STRATEGIES

    spec = family(config)
    if spec.in_log or start_kind(config) in spec.shifting or STRATEGIES[config.method.name].adds_to_weights():
        check_makeable(home() / "frozen", f"FEDSB_HOME={home()}")
