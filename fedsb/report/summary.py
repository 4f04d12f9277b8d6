"""The summary of a run: what ``summary.json`` holds."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import fedsb
from fedsb.privacy.claim import NO_MECHANISM
from fedsb.report.clients import client_spread
from fedsb.report.series import final_metrics, largest_extra, largest_gap, total_or_none, totals
from fedsb.run.records import RoundRecord
from fedsb.run.schema_files import KEY, SUMMARY

PACKAGES = ("torch", "flwr", "transformers", "datasets", "opacus", "peft", "safetensors", "numpy", "ray")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that shape a result; one that is not installed is left out."""
    # A simulated client runs the code that was submitted, which need not be what is installed.
    found = {"fedsb": fedsb.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if "torch" in sys.modules:
        # Its build (+cpu, +cu130) decides on the last bits too, and only the package itself tells which one it is.
        found["torch"] = str(sys.modules["torch"].__version__)
    return found


def build_summary(
    *,
    method: str,
    rounds: int,
    clients: int,
    seed: int,
    model: str,
    data: str,
    rank: int | None,
    trained_params: int,
    records: Sequence[RoundRecord],
    factors_sha256: str,
    wall_s: float,
    held_modules: Sequence[str] | None = None,
    epsilon: Mapping[str, Any] | None = None,
    epsilon_reason: str | None = NO_MECHANISM,
    partition: Mapping[str, Any] | None = None,
    selected: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Gather the summary of a run; ``rank`` is None without adapters, ``epsilon_reason`` says why ``epsilon`` is None, else is dropped.

    ``held_modules`` are those that the held gap was measured on; None stands for all of them.

    ``partition`` is how a simulation's examples are dealt out (:meth:`fedsb.data.skew.Skew.as_dict`), where it may be told.
    ``selected`` is the round that was chosen (:meth:`fedsb.report.selection.Selection.told`): the metrics are of that one then.
    A run whose rounds do not tell their times does not tell its own.

    Raises:
        ValueError: neither epsilon nor a reason for its absence is given.
    """
    if epsilon is None and not epsilon_reason:
        raise ValueError("a run without epsilon must say why: give epsilon_reason")
    return {
        KEY: SUMMARY,
        "method": method,
        "rounds": rounds,
        "rounds_done": max((record.round for record in records), default=0),
        "clients": clients,
        "seed": seed,
        "model": model,
        "data": data,
        "rank": rank,
        "trained_params": trained_params,
        "metrics": final_metrics([record for record in records if selected is None or record.round == selected["round"]]),
        "selected": None if selected is None else dict(selected),
        "client_metrics": client_spread(records),
        "partition": None if partition is None else dict(partition),
        **totals(records),
        "exactness_gap": largest_gap(records),
        **{key: value for key in ("secure_gap", "secure_gap_most") if (value := largest_extra(records, key)) is not None},
        "gap_error": largest_gap(records, "gap_error"),
        "held_gap": largest_gap(records, "held_gap"),
        "held_gap_modules": None if held_modules is None else list(held_modules),
        "failures": sum(len(record.failed) for record in records),
        "factors_sha256": factors_sha256,
        "epsilon": None if epsilon is None else dict(epsilon),
        "epsilon_reason": epsilon_reason if epsilon is None else None,
        "wall_s": None if any(record.wall_s is None for record in records) else wall_s,
        "cpu_s": total_or_none([record.cpu_s for record in records]),
        "versions": versions(),
    }
