"""The command line: ``fedsb run | report | export | cost``."""

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
from socket import gethostname

from omegaconf import DictConfig

from fedsb.errors import RunError, UserError, unknown
from fedsb.folders import check_makeable
from fedsb.logs import say_early, speaking_to

USAGE = """usage: fedsb COMMAND …

  fedsb run [key=value …] [-m] [--cfg job]   run a federation in this process (Hydra overrides; -m sweeps)
  fedsb cost [key=value …]                   parameters and bytes of every method for a model, without its weights
  fedsb report FOLDER [FOLDER …]             write report.md and plots for a run, or a comparison of several
  fedsb export FOLDER [OUT]                  write the merged model of a finished run"""

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130
FLAGS_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 the run failed, 2 a mistake in what was given."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        raise SystemExit(0 if arguments else MISTAKE)
    raise SystemExit(_guarded(lambda: _dispatch(arguments[0], arguments[1:])))


def _dispatch(command: str, arguments: list[str]) -> int:
    if command not in COMMANDS:
        raise unknown("command", command, COMMANDS)
    return COMMANDS[command](arguments)


def _guarded(action: Callable[[], int]) -> int:
    """Turn a user's mistake into one line and exit status 2, a failed run into one line and 1."""
    try:
        return action()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except RunError as error:
        print(f"error: the run stopped: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def run(arguments: list[str]) -> int:
    """Run one federation, or with ``-m`` one for each combination of the swept values."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.utils import env_override

    from fedsb.config import ROOT, conf_dir, load
    from fedsb.resuming import resumed

    overrides = overrides_in(arguments)
    sweep = any(flag in arguments for flag in ("-m", "--multirun"))
    for job in sweep_jobs(overrides) if sweep else [overrides]:
        config = load(job)
        check_makeable(Path(config.output or "outputs").expanduser(), f"output={config.output}" if config.output else "outputs")
        if config.resume:
            from fedsb.assembly import anchored, peopled

            resumed(peopled(anchored(config, Path.cwd())), job)
    here = gethostname(), os.getpid()
    statuses: list[int] = []

    def job_main(composed: DictConfig) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        if here != (gethostname(), os.getpid()):
            # A launcher's process, whose list is a copy: what it raises is raised here again.
            _run_afresh(composed, folder)
            return
        statuses.append(_guarded(lambda: _run_afresh(composed, folder)))
        if statuses[-1] == INTERRUPTED:
            raise SystemExit(INTERRUPTED)  # and no other job of the sweep

    argv = sys.argv
    # Hydra's parser takes flags in front of overrides, or behind them, but not in between.
    sys.argv = ["fedsb", *flags_in(arguments), *overrides]
    try:
        # In a sweep Hydra is to hand on what a job has raised, and not to print it and exit.
        with env_override({"HYDRA_FULL_ERROR": "1"} if sweep else {}):
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=ROOT)(job_main)()
    finally:
        sys.argv = argv
    return max(statuses, default=0)


def _run_afresh(composed: DictConfig, folder: Path) -> int:
    """Run a job in the folder that Hydra made for it, and leave none where there was a mistake in what was given."""
    try:
        return run_job(composed)
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


def run_job(composed: DictConfig) -> int:
    """Run one composed configuration in this process."""
    with speaking_to(people=sys.stdout is not None and sys.stdout.isatty()):
        return _run_job(composed)


def _run_job(composed: DictConfig) -> int:
    from hydra.core.hydra_config import HydraConfig

    from fedsb.config import typed

    overrides = list(HydraConfig.get().overrides.task)
    output = Path(HydraConfig.get().runtime.output_dir)
    from fedsb.assembly import anchored, peopled
    from fedsb.resuming import resumed

    given = peopled(anchored(typed(composed), Path.cwd()))
    config = resumed(given, overrides)
    say_early("loading model and data …", progress=config.progress)
    _quieten()
    from fedsb.runtime.grids import grid_for
    from fedsb.server_app import serve

    _log_to_screen()
    folder = Path(config.resume or output)
    grid = grid_for(config, {"overrides": shlex.join(overrides), "output": str(folder)})
    try:
        serve(config, grid, folder, given=given)
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


def report(arguments: list[str]) -> int:
    """Write the report of one run, or the comparison of several."""
    from fedsb.report.report import write_reports

    folders = [Path(a) for a in arguments]
    if not folders:
        raise UserError("fedsb report needs the folder of a run: fedsb report outputs/…")
    for path in write_reports(folders):
        print(path)
    return 0


def export(arguments: list[str]) -> int:
    """Write the merged model of a run."""
    from fedsb.exporting import export_merged

    if not arguments:
        raise UserError("fedsb export needs the folder of a run: fedsb export outputs/… [OUT]")
    out, remark = export_merged(Path(arguments[0]), Path(arguments[1]) if len(arguments) > 1 else Path(arguments[0]) / "merged")
    print(out)
    if remark:
        print(remark, file=sys.stderr)
    return 0


def cost(arguments: list[str]) -> int:
    """Print what every method costs."""
    from fedsb.costs import print_costs
    from strategies import STRATEGIES

    print_costs(arguments, {name: strategy.residual_rank for name, strategy in STRATEGIES.items()})
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {"run": run, "cost": cost, "report": report, "export": export}

if __name__ == "__main__":
    main()
