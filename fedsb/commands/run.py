"""``fedsb run``: one federation, or with ``-m`` one for each point of a grid."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig

from fedsb.commands.flags import SHOWING, SWEEP, flags_in, has_flag, overrides_in
from fedsb.commands.outcome import guarded
from fedsb.config.overrides import readable
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
        from fedsb.commands.sweep import sweep

        return sweep(flags, overrides)
    if lone := next((text for text in overrides if text.startswith(("sweep=", "sweep."))), None):
        raise UserError(f"{lone} is of a sweep: add -m, or leave it out")
    config = check_job(overrides)
    statuses: list[int] = []

    def job_main(composed: DictConfig) -> None:
        statuses.append(guarded(lambda: _run_afresh(composed)))

    named = config.output or config.resume or has_flag(flags, SHOWING) or any(text.startswith("hydra.run.dir=") for text in overrides)
    folder = None if named else claim(Path(default_output(None, None)))
    try:
        through_hydra([*flags, *overrides, *([f"hydra.run.dir='{folder}'"] if folder else [])], job_main)
    finally:
        if folder:
            forget_empty(folder)
    return max(statuses, default=0)


def check_job(overrides: Sequence[str]) -> Config:
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
    return config


def through_hydra(arguments: Sequence[str], job_main: Callable[[DictConfig], None]) -> None:
    """Let Hydra take arguments as from a command line, and call for each of its jobs what is given, with what it has composed."""
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
    with speaking_to(people=to_people()):
        return _run_job(given, overrides, output)


def to_people() -> bool:
    """Tell whether people read standard output."""
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
