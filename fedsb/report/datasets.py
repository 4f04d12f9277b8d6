"""Over which data runs are: what was measured on other data is another experiment, and is shown apart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedsb.report.labels import flatten
from fedsb.report.table import plural
from fedsb.run.folder import Run

NAMED = ("kind", "path", "test_path", "public_path", "validation_path")
Identity = tuple[tuple[str, str], ...]
APART = "**These runs are over different data**, shown apart and not held against each other: {listed}."


def by_data(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return runs by the name of their data, in the order in which they first appear.

    Data are the same where all settings of ``data`` are and, of runs of sweeps, the hashes that their manifests hold. A run outside of a
    sweep, of which nobody tells a hash, is over the data of those that have its settings, as long as these are of one hash.
    """
    told = [(_sorted(_settings(run)), _sorted(_hashes(run))) for run in runs]
    known: dict[Identity, set[Identity]] = {}
    for settings, hashes in told:
        known.setdefault(settings, set()).update([hashes] if hashes else [])
    found: dict[tuple[Identity, Identity], list[Run]] = {}
    for run, (settings, hashes) in zip(runs, told, strict=True):
        others = known[settings]
        found.setdefault((settings, next(iter(others)) if not hashes and len(others) == 1 else hashes), []).append(run)
    names = _names([(group[0], dict(hashes)) for (_, hashes), group in found.items()])
    return dict(zip(names, found.values(), strict=True))


def apart_text(parts: Mapping[str, Sequence[Run]]) -> str:
    """Warn of runs over different data; empty where there are none."""
    if len(parts) < 2:
        return ""
    return APART.format(listed="; ".join(f"{name} ({plural(len(runs), 'run')})" for name, runs in parts.items()))


def left_out_text(lines: Sequence[str]) -> str:
    """Say which runs could not be read; empty where all could."""
    return f"**Left out**: {'; '.join(lines)}." if lines else ""


def _settings(run: Run) -> dict[str, str]:
    found = run.setting("data")
    return dict(flatten(found)) if isinstance(found, Mapping) else {}


def _sorted(row: Mapping[str, str]) -> Identity:
    return tuple(sorted(row.items()))


def _hashes(run: Run) -> dict[str, str]:
    """Return what the manifest of a run's sweep says of its data; nothing of a run outside of one."""
    settings = _settings(run)
    told = _manifest_data(run.path.absolute().parent / "manifest.json")
    return {value: told[value] for key in NAMED if (value := settings.get(key, "")) in told}


def _manifest_data(path: Path) -> Mapping[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, Mapping) else {}


def _names(firsts: Sequence[tuple[Run, Mapping[str, str]]]) -> list[str]:
    """Name data by kind or file, and by the settings or the hash in which those of one name differ."""
    settings = [_settings(run) for run, _ in firsts]
    names = [_plain(run) for run, _ in firsts]
    differing = [key for key in dict.fromkeys(key for row in settings for key in row) if len({row.get(key) for row in settings}) > 1]
    told: list[str] = []
    for (_, content), row, name in zip(firsts, settings, names, strict=True):
        words = [f"{key} {row.get(key, '–')}" for key in differing if key not in NAMED]
        alike = names.count(name) > 1
        hashes = [f"content {value[:12]}" for value in content.values()] if alike and not words else []
        text = " ".join([name, *(words if alike else ()), *hashes])
        told.append(text if text not in told else f"{text} ({len(told) + 1})")
    return told


def _plain(run: Run) -> str:
    settings = _settings(run)
    path = settings.get("path", "None")
    return Path(path).name if path != "None" else settings.get("kind") or str((run.summary or {}).get("data") or "unknown data")
