"""What runs that are shown together are called: by the settings in which they differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedsb.run.folder import Run

# Shown wherever they differ; every other setting only where it tells two runs apart that these do not.
TOLD: dict[str, str] = {"rank": "rank", "federation.num_clients": "clients", "seed": "seed"}
# Where a run lies and how it is shown: no setting of it.
NO_SETTING = ("output", "resume", "progress", "keep_checkpoints", "plots", "cost", "method")
# Last words that say nothing without the one before them.
BARE = ("kind", "name", "unit")


def run_labels(runs: Sequence[Run], *, without: Iterable[str] = ()) -> list[str]:
    """Name each run by its method and by what differs between the runs; the folder's name tells apart those that are left alike.

    Args:
        runs: shown together.
        without: dotted settings that are not to be told.
    """
    keys = [key for key in varying(runs) if key not in set(without)]
    labels = [" ".join([run.method, *_words(run, keys)]) for run in runs]
    return labels if without else [f"{l} ({r.path.name})" if labels.count(l) > 1 else l for l, r in zip(labels, runs, strict=True)]  # noqa: E741


def varying(runs: Sequence[Run]) -> list[str]:
    """Return the dotted settings that tell runs apart, fewest first: one that follows from others in all of them is left out."""
    flat = [dict(flatten(run.config)) for run in runs]
    chosen = [key for key in TOLD if len({row.get(key) for row in flat}) > 1]
    rest = sorted(key for row in flat for key in row if key.partition(".")[0] not in NO_SETTING and key not in TOLD)
    for key in dict.fromkeys(sorted(rest, key=lambda key: (key.count("."), key))):
        if _tells_apart(key, runs, flat, chosen):
            chosen.append(key)
    return chosen


def _tells_apart(key: str, runs: Sequence[Run], flat: Sequence[Mapping[str, str]], chosen: Sequence[str]) -> bool:
    seen: dict[tuple[str | None, ...], str | None] = {}
    for run, row in zip(runs, flat, strict=True):
        alike = (run.method, *(row.get(other) for other in chosen))
        if seen.setdefault(alike, row.get(key)) != row.get(key):
            return True
    return False


def _words(run: Run, keys: Sequence[str]) -> list[str]:
    return [f"{_word(key, keys)} {run.setting(key)}" for key in keys if _applies(run, key)]


def _word(key: str, keys: Sequence[str]) -> str:
    parts = key.split(".")
    last = [other.rpartition(".")[2] for other in keys]
    if parts[-1] in BARE and len(parts) > 1:
        return parts[-2]
    return TOLD.get(key, parts[-1] if last.count(parts[-1]) == 1 else key)


def _applies(run: Run, key: str) -> bool:
    """Tell whether a setting has a meaning in a run: one without adapters has no rank, whatever its configuration says."""
    return key != "rank" or (run.summary or {}).get("rank", 0) is not None


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield the dotted settings of a configuration as text, but for its folder."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        elif key != "output":
            yield f"{prefix}{key}", str(value)
