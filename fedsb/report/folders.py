"""What ``fedsb report`` writes: of the folder of a run its report and page, of several runs, or of a sweep, their comparison."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fedsb.core.disk import replace_whole
from fedsb.core.errors import UserError
from fedsb.report.comparing import comparisons
from fedsb.report.comparison import PAGE, write_comparison
from fedsb.report.methods import Asked
from fedsb.report.page.page import page_text
from fedsb.report.report import write_report
from fedsb.run.folder import DamagedRunError, read_run

RUN_PAGE = "report.html"


def write_reports(folders: Sequence[str | Path], out: str | Path | None = None, asked: Asked | None = None) -> list[Path]:
    """Write a run's report and its page into its folder or, for several runs, their comparison; return the files, the page last.

    Of several runs, those that have finished keep the report that they wrote, and one whose folder is damaged is left out and told of. A
    folder of a sweep stands for the runs in it, and is where their comparison goes if it is the only one.

    Args:
        folders: of runs or sweeps.
        out: where the comparison goes.
        asked: what it is to show.

    Raises:
        UserError: one of the folders holds no run, or all that there are are damaged; something is asked of a comparison, and there is one
            run.
    """
    found = [run for folder in folders for run in runs_in(Path(folder))]
    if len(found) == 1:
        if asked not in (None, Asked()):
            raise UserError("--against, --metric, --target and --tuned are for several runs; give the folders of more")
        return [write_report(found[0]), write_run_page(found[0])]
    comparison = write_comparison(found, out, asked)
    reports = []
    for folder in found:
        with suppress(DamagedRunError):  # the comparison tells of it
            reports += [] if _is_reported(folder) else [write_report(folder)]
    return [*reports, comparison, comparison.with_name(PAGE)]


def write_run_page(folder: Path) -> Path:
    """Write ``report.html``, the page of a run alone, into its folder.

    Raises:
        UserError: the folder holds no run, or a damaged one.
    """
    run = read_run(folder)
    replace_whole(run.path / RUN_PAGE, page_text(comparisons([run], Asked()), run.path))
    return run.path / RUN_PAGE


def _is_reported(folder: Path) -> bool:
    return (folder / "summary.json").is_file() and (folder / "report.md").is_file()


def runs_in(folder: Path) -> list[Path]:
    """Return the run in a folder, or the runs of the sweep in it, in the order of its jobs; the folder itself where it holds neither.

    Raises:
        UserError: the manifest of the sweep can't be read.
    """
    if (folder / "metrics.jsonl").is_file():
        return [folder]
    # A summary without records is that of a run that has lost them: it is told of as damaged.
    files = sorted(path for name in ("metrics.jsonl", "summary.json") for path in folder.glob(f"*/{name}") if path.stat().st_size)
    jobs = {path.parent.name: path.parent for path in files}
    if (named := _jobs_in(folder / "manifest.json")) is not None:
        return [jobs[name] for name in named if name in jobs] or [folder]
    return sorted(jobs.values(), key=lambda path: (not path.name.isdecimal(), path.name.zfill(9))) or [folder]


def _jobs_in(manifest: Path) -> list[str] | None:
    """Return the folders' names of a sweep's jobs, in their order; None where no manifest tells them."""
    if not manifest.is_file():
        return None
    try:
        return [str(row["name"]) for row in json.loads(manifest.read_text(encoding="utf-8"))["jobs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"'{manifest}' can't be read ({' '.join(str(error).split())[:80]}); restore it, or name the runs' folders"
        ) from None
