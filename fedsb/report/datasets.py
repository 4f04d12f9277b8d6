"""Over which data runs are: what was measured on other data is another experiment, and is shown apart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedsb.report.labels import flatten
from fedsb.report.table import plural
from fedsb.run.folder import Run

NAMED = ("kind", "path", "test_path", "public_path", "subset")
APART = "**These runs are over different data**, shown apart and not held against each other: {listed}."


def by_data(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return runs by the name of their data, in the order in which they first appear.

    Data are the same where all settings of ``data`` are and, of runs of sweeps, the hashes that their manifests hold.
    """
    found: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(_identity(run), []).append(run)
    return dict(zip(_names([group[0] for group in found.values()]), found.values(), strict=True))


def apart_text(parts: Mapping[str, Sequence[Run]]) -> str:
    """Warn of runs over different data; empty where there are none."""
    if len(parts) < 2:
        return ""
    return APART.format(listed="; ".join(f"{name} ({plural(len(runs), 'run')})" for name, runs in parts.items()))


def _settings(run: Run) -> dict[str, str]:
    found = run.setting("data")
    return dict(flatten(found)) if isinstance(found, Mapping) else {}


def _identity(run: Run) -> tuple[object, ...]:
    return (*sorted(_settings(run).items()), *sorted(_hashes(run).items()))


def _hashes(run: Run) -> dict[str, str]:
    """Return what the manifest of a run's sweep says of its data; nothing of a run outside of one."""
    settings = _settings(run)
    told = _manifest_data(run.path.parent / "manifest.json")
    return {value: told[value] for key in NAMED if (value := settings.get(key, "")) in told}


def _manifest_data(path: Path) -> Mapping[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, Mapping) else {}


def _names(firsts: Sequence[Run]) -> list[str]:
    """Name data by kind or file, and by the settings or the hash in which those of one name differ."""
    settings = [_settings(run) for run in firsts]
    names = [_plain(run) for run in firsts]
    differing = [key for key in dict.fromkeys(key for row in settings for key in row) if len({row.get(key) for row in settings}) > 1]
    told: list[str] = []
    for run, row, name in zip(firsts, settings, names, strict=True):
        words = [f"{key} {row.get(key, '–')}" for key in differing if key not in NAMED]
        alike = names.count(name) > 1
        hashes = [f"content {value[:12]}" for value in _hashes(run).values()] if alike and not words else []
        text = " ".join([name, *(words if alike else ()), *hashes])
        told.append(text if text not in told else f"{text} ({len(told) + 1})")
    return told


def _plain(run: Run) -> str:
    settings = _settings(run)
    path = settings.get("path", "None")
    return Path(path).name if path != "None" else settings.get("kind") or str((run.summary or {}).get("data") or "unknown data")
