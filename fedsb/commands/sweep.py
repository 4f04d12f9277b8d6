"""``fedsb run -m``: the jobs of one grid in one folder. What has finished is skipped, and what was cut off goes on."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fedsb.commands.run as runs
from fedsb.app.anchoring import anchored
from fedsb.app.assembly import peopled
from fedsb.commands.flags import SHOWING, has_flag
from fedsb.commands.job import line_of, run_numbered, status_of_job
from fedsb.commands.outcome import DONE
from fedsb.config.compose import composed_yaml, default_sweep, load
from fedsb.config.schema import Config
from fedsb.core.errors import UserError
from fedsb.core.folders import check_makeable, claim
from fedsb.core.logs import last_line, say_early, speaking_to
from fedsb.report.table import human_bytes
from fedsb.run.resuming import is_free
from fedsb.sweep.abreast import abreast, cores, job_bytes
from fedsb.sweep.board import Board
from fedsb.sweep.crew import Crew, Task
from fedsb.sweep.endings import JOBS, Ending, endings, note
from fedsb.sweep.grid import resolved
from fedsb.sweep.jobs import Job
from fedsb.sweep.manifest import MANIFEST, Manifest, held, manifest_of, mark, read, write
from fedsb.sweep.orphans import at_work, await_left, forget_work, has_begun
from fedsb.sweep.standing import FINISHED, DamagedJobError, set_aside, state_of
from fedsb.sweep.telling import tell

if TYPE_CHECKING:
    from fedsb.sweep.afar import RayCrew

PRINTED = "printed"  # what jobs side by side print, a file each
WHERE = ("sweep.jobs=", "sweep.address=")  # what decides where jobs run, and nothing of what comes out
PLACES = ("output=", "hydra.sweep.dir=")


@dataclass(frozen=True)
class Sweep:
    """A sweep that is about to run.

    Attributes:
        folder: of the sweep.
        manifest: what it is.
        configs: of its jobs.
        more: overrides for all jobs that decide where they run and what is shown, and nothing of what comes out.
        launcher: overrides of Hydra's own.
        wanted: jobs side by side, as asked for.
        address: of the Ray cluster that takes them; None is this machine.
    """

    folder: Path
    manifest: Manifest
    configs: tuple[Config, ...]
    more: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()
    wanted: int | str = 1
    address: str | None = None

    @property
    def progress(self) -> str:
        """How its progress is shown."""
        return self.configs[0].progress


def sweep(flags: Sequence[str], overrides: Sequence[str]) -> int:
    """Run the jobs of a sweep that have not finished, each in a folder below that of the sweep; all are checked before the first runs.

    Raises:
        UserError: a mistake in one of them, or a folder that holds something else.
    """
    launcher = tuple(text for text in overrides if text.lstrip("+~").startswith(("hydra.", "hydra/")) and not text.startswith(PLACES))
    if foreign := next((text for text in launcher if text.lstrip("+~").startswith(("hydra/sweeper=", "hydra.sweep.subdir="))), None):
        raise UserError(f"{foreign}: a sweep is laid out here; name the values, draw them (sweep.samples=N), or write conf/sweep/NAME.yaml")
    own = [text for text in overrides if text.lstrip("+~").startswith(("sweep.", "sweep="))]
    given = {key: value.strip("'\"") for key, _, value in (text.partition("=") for text in overrides) if value}
    grid = [text for text in overrides if text not in (*launcher, *own) and not text.startswith((*PLACES, "resume="))]
    settings = load(own).sweep
    if "resume" in given:
        found = _left(Path(given["resume"]), [*grid, *(text for text in own if not text.startswith(WHERE))], given)
        return _run(replace(found, launcher=launcher, wanted=settings.jobs, address=settings.address))
    jobs = resolved(grid, settings)
    if has_flag(flags, SHOWING):
        return _shown(flags, jobs)
    output = given.get("hydra.sweep.dir", given.get("output"))
    if output is not None:
        check_makeable(Path(output).expanduser(), f"output={output}")
    configs = tuple(checked(job.overrides, Path.cwd()) for job in jobs)
    manifest = manifest_of(jobs, configs, Path.cwd())
    folder = Path(output) if output is not None else claim(Path(default_sweep(None)))
    return _run(Sweep(folder, manifest, configs, launcher=launcher, wanted=settings.jobs, address=settings.address))


def _shown(flags: Sequence[str], jobs: Sequence[Job]) -> int:
    """Print the configuration of each job."""
    if not has_flag(flags, ("--cfg", "-c")) or not {"job", "--cfg=job"} & set(flags):
        raise UserError("with -m only --cfg job can be shown; leave -m out for the others")
    for job in jobs:
        print(f"# job {job.number + 1} of {len(jobs)}: {job.label}\n{composed_yaml(job.overrides)}")
    return 0


def _left(folder: Path, more: Sequence[str], given: Mapping[str, str]) -> Sweep:
    """Return the sweep in a folder, to go on with it.

    Raises:
        UserError: none is there, or what is given beside would change what comes out.
    """
    if (folder / "config.yaml").is_file():
        raise UserError(f"resume={folder}: that is a run, and no sweep; leave -m out")
    if output := next((given[key] for key in ("output", "hydra.sweep.dir") if key in given), None):
        raise UserError(f"output={output} with resume={folder}: a sweep goes on in its own folder; leave output out")
    manifest = read(folder)
    if other := [text for text in more if text.startswith("sweep") or not is_free(text.partition("=")[0].lstrip("+~"))]:
        raise UserError(f"resume={folder}: its grid is its own; leave out {' '.join(other)}, or begin another sweep")
    place = Path(manifest.place)
    configs = tuple(checked([*job.overrides, *more], place) for job in manifest.jobs)
    return Sweep(folder, manifest_of(manifest.jobs, configs, place), configs, tuple(more))


def checked(overrides: Sequence[str], place: Path) -> Config:
    """Return the configuration of a job, its paths absolute and its clients named, once nothing is known that would end it early."""
    return peopled(anchored(runs.check_job(overrides), place))


def _run(sweep: Sweep) -> int:
    folder, manifest = sweep.folder, sweep.manifest
    if sweep.address is not None:
        _join(sweep)
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        if (folder / MANIFEST).is_file():
            read(folder).check_same(folder, manifest)
        elif (folder / JOBS).is_file():
            raise UserError(f"'{folder}' holds a sweep without {MANIFEST}, of an earlier version; choose another output=…")
        write(folder, manifest)
        left = [job for job, config in zip(manifest.jobs, sweep.configs, strict=True) if not _stands_finished(sweep, job, config)]
        try:
            _launch(sweep, left)
        finally:
            write(folder, manifest)
            with speaking_to(people=runs.to_people()):
                tell(folder, manifest.jobs, progress=sweep.progress)
    return max((ending.status for ending in endings(folder).values()), default=0)


def _stands_finished(sweep: Sweep, job: Job, config: Config) -> bool:
    """Tell whether a job has finished, and say so; what is damaged is set aside."""
    folder = sweep.folder / job.name
    with speaking_to(people=runs.to_people()):
        try:
            if state_of(folder, config) != FINISHED:
                return False
        except DamagedJobError as error:
            say_early(set_aside(folder, config, error), progress=sweep.progress)
            return False
        say_early(line_of(job, len(sweep.manifest.jobs), FINISHED), progress=sweep.progress)
    before = endings(sweep.folder).get(job.number)
    note(sweep.folder, Ending(job.number, job.label, DONE, skipped=True, wall_s=before.wall_s if before else 0.0))
    return True


def _launch(sweep: Sweep, left: Sequence[Job]) -> None:
    if not left:
        return
    if any(text.lstrip("+").startswith("hydra/launcher=") for text in sweep.launcher):
        _hand_to_launcher(sweep, left)
        return
    configs = [sweep.configs[job.number] for job in left]
    if sweep.address is not None:
        _afar(sweep, left, configs)
        return
    size, cards = abreast(sweep.wanted, configs)
    if size > 1:
        _side_by_side(sweep, left, size, lambda task: Crew(size, task, cards=cards, cores=max(1, cores() // size)))
        return
    for job in left:
        write(sweep.folder, sweep.manifest, running=[job.number])
        if run_numbered(sweep.folder, job.number, sweep.more).by_signal:
            return


def _join(sweep: Sweep) -> bool:
    """Join the Ray cluster that jobs are to run on, and tell whether it has GPUs.

    Raises:
        UserError: there is none, a job would take all of it, or a launcher is to run the jobs.
    """
    from fedsb.sweep.afar import join

    given = f"sweep.address={sweep.address}"
    if any(config.runtime.kind != "local" for config in sweep.configs):
        raise UserError(f"{given} with runtime=ray: a job's clients would take the cluster; leave one of the two out")
    if sweep.launcher:
        raise UserError(f"{given} with {sweep.launcher[0]}: both say where jobs run; leave one of the two out")
    return join(str(sweep.address))


def _afar(sweep: Sweep, left: Sequence[Job], configs: Sequence[Config]) -> None:
    """Run jobs on the machines of a Ray cluster.

    Raises:
        UserError: it has no room for a job.
    """
    from fedsb.sweep.afar import Needs, RayCrew

    threads, memory = max(config.runtime.threads for config in configs), max(job_bytes(config.model) for config in configs)
    cards = int(_join(sweep) and any(config.device != "cpu" for config in configs))
    needs = Needs(threads, memory, cards)
    if not (fits := needs.fit()):
        raise UserError(f"sweep.address={sweep.address}: none of its machines has {threads} CPUs and {human_bytes(memory)} for a job")
    size = min(len(left), fits if sweep.wanted == "auto" else int(sweep.wanted))
    _side_by_side(sweep, left, size, lambda task: RayCrew(size, task, needs))


def _side_by_side(sweep: Sweep, left: Sequence[Job], size: int, crew_of: Callable[[Task], Crew | RayCrew]) -> None:
    """Run jobs in other processes, and show how they get on."""
    folder, jobs = sweep.folder.absolute(), {job.number: job for job in left}
    printed = {number: folder / PRINTED / f"{job.name}.txt" for number, job in jobs.items()}
    task = Task(partial(status_of_job, str(folder), sweep.more), printed, Path.cwd(), dict(os.environ))
    running: set[int] = set()
    rounds = {number: sweep.configs[number].federation.num_rounds for number in jobs}
    with speaking_to(people=runs.to_people()):
        board = Board(folder, sweep.manifest.jobs, rounds, size, progress=sweep.progress)
        with board, crew_of(task) as crew:
            for event in crew.run(list(jobs)):
                if event.job is None:
                    board.look()
                elif event.status is None:
                    running.add(event.job)
                    board.begun(event.job)
                else:
                    running.discard(event.job)
                    if event.killed_by and not (folder / jobs[event.job].name / "summary.json").is_file():
                        note(folder, Ending(event.job, jobs[event.job].label, event.status, event.killed_by, wall_s=event.wall_s))
                    board.ended(event.job, event.status)
                if event.job is not None:
                    write(folder, sweep.manifest, running)


def _hand_to_launcher(sweep: Sweep, left: Sequence[Job]) -> None:
    """Let one of Hydra's launchers run the jobs: what it is told of each is a number, by which the job's process finds it.

    One that gives up because a job's process has died, as most do, may leave others at work: they are waited for.
    """
    before = endings(sweep.folder)
    numbers = [job.number for job in left]
    one = partial(_launched, str(sweep.folder.absolute()), sweep.more)
    # Whatever the grid, Hydra sees one key, and makes no folders of its own.
    grid = f"+sweep_job={','.join(map(str, numbers))}"
    try:
        runs.through_hydra(["-m", *sweep.launcher, f"hydra.sweep.dir='{sweep.folder}'", "hydra.sweep.subdir=.", grid], one)
    except Exception as error:
        if endings(sweep.folder) == before and not has_begun(sweep.folder):
            raise
        reason = f"the launcher said: {type(error).__name__}: {last_line(str(error))}"[:200]
        say_early(f"a job's process has died; waiting for those that go on ({reason})", progress=sweep.progress)
        await_left(sweep.folder, left, before, reason)
    forget_work(sweep.folder)


def _launched(folder: str, more: Sequence[str], composed: Any) -> None:
    sweep, number = Path(folder), int(composed.sweep_job)
    manifest = read(sweep)
    with at_work(sweep, number):
        mark(sweep, manifest, number, running=True)
        try:
            ending = run_numbered(sweep, number, more)
        finally:
            mark(sweep, manifest, number, running=False)
    if ending.by_signal:
        raise SystemExit(ending.status)  # and no other job of the sweep
