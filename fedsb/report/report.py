"""``report.md`` of a run, and ``comparison.md`` of several: made from run folders alone, so they can be made again at any time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsb.report.clients import UNMEASURED, client_rows, partition_text, spread_rows
from fedsb.report.plots import compare, plot_run, run_labels
from fedsb.report.privacy import account_rows, accounts_of, claim_text
from fedsb.report.records import RoundRecord, Run, finite, read_run
from fedsb.report.series import final_metrics, largest_gap, mean_over_clients, metric_names, totals
from fedsb.report.table import epsilon_text, gap_text, human_bytes, human_seconds, number, plural

# Label, and the settings that it shows; one that the run's configuration lacks is left out.
SETTINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("method", ("method.name",)),
    ("rank", ("rank",)),
    ("start", ("init.kind", "init.evidence", "init.core")),
    ("adapted layers", ("adapter.targets",)),
    ("model", ("model.name",)),
    ("data", ("data.kind", "data.path", "data.task")),
    ("partition", ("federation.partition.kind", "federation.partition.alpha")),
    ("clients", ("federation.num_clients",)),
    ("share of clients a round", ("federation.fraction",)),
    ("rounds", ("federation.num_rounds",)),
    ("weights", ("federation.weighting",)),
    ("local training", ("train.optimizer", "train.lr", "train.local_epochs", "train.local_steps", "train.batch_size")),
    ("server optimiser", ("federation.server_optimizer.name",)),
    ("privacy", ("privacy.unit", "privacy.epsilon", "privacy.noise_multiplier", "privacy.max_epsilon")),
    ("clipping", ("privacy.clipping", "privacy.max_grad_norm")),
    ("wire", ("federation.wire_dtype",)),
    ("seed", ("seed",)),
)
OF_ADAPTERS = ("rank", "start", "adapted layers")
OF_PRIVACY = ("privacy", "clipping")
CAPTIONS = {
    "quality": "Quality after each round; round 0 is before training.",
    "bytes": "Payload so far, summed over clients.",
    "quality_against_bytes": "Quality against the payload so far.",
    "exactness": "Exactness gap of each round.",
    "noise": "Simulation only: what was clipped, and what the noise left of the signal. No noise covers these figures themselves.",
}
EXACTNESS = (
    "The largest exactness gap of any round is {gap}: the relative distance between the weight change that the clients hold after a round "
    "and the true weighted mean of theirs, before any server optimiser, clipping or noise. Float32 rounding alone stays below 1e-5."
)


def write_reports(folders: Sequence[str | Path], out: str | Path | None = None) -> list[Path]:
    """Write each run's report into its folder and, for several runs, their comparison; return the files, the comparison last.

    Raises:
        UserError: one of the folders holds no run.
    """
    reports = [write_report(folder) for folder in folders]
    return [*reports, write_comparison(folders, out)] if len(folders) > 1 else reports


def write_report(folder: str | Path, summary: Mapping[str, Any] | None = None) -> Path:
    """Write ``report.md`` and its plots into a run's folder.

    Args:
        folder: of the run.
        summary: of a run that is about to write it; by default the folder's own.

    Raises:
        UserError: the folder holds no run.
    """
    run = read_run(folder)
    if summary is not None:
        run = replace(run, summary=finite(summary))
    return _write(run.path / "report.md", report_text(run, plot_run(folder)))


def report_text(run: Run, plots: Sequence[Path] = ()) -> str:
    """Return a run's report in Markdown, showing ``plots``, which lie beside it."""
    images = {plot.stem: f"![{plot.stem.replace('_', ' ')}]({plot.name})\n\n*{CAPTIONS[plot.stem]}*" for plot in plots}
    noise = images.pop("noise", "")
    sections = {
        "What ran": _what_ran(run),
        "Rounds": "\n\n".join([_rounds(run), *images.values()]),
        "Clients": _clients(run),
        "Communication": _communication(run),
        "Exactness": _exactness(run),
        "Privacy": _privacy(run, [noise]),
        "Failures": _failures(run),
        "Versions": _versions(run),
    }
    return _document(f"Run {run.path.resolve().name}", _lead(run), sections)


def write_comparison(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write ``comparison.md`` and ``comparison.png`` into ``out``, or into the first run's parent folder.

    Raises:
        UserError: one of the folders holds no run.
    """
    runs = [read_run(folder) for folder in folders]
    where = runs[0].path.parent if out is None else Path(out)
    plot = compare(folders, where / "comparison.png")
    sections = {"Results": f"{_results(runs)}\n\n![The runs side by side]({plot.name})", "Settings that differ": _differences(runs)}
    lead = f"{plural(len(runs), 'run')}; bytes are summed over clients and rounds."
    return _write(where / "comparison.md", _document("Comparison of runs", lead, sections))


def _document(title: str, lead: str, sections: Mapping[str, str]) -> str:
    parts = [f"# {title}", lead, *(f"## {heading}\n\n{text}" for heading, text in sections.items())]
    return "\n\n".join(parts) + "\n"


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def _table(head: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _lead(run: Run) -> str:
    last = run.records[-1]
    result = ", ".join(f"{name} **{number(value)}**" for name, value in final_metrics(run.records).items()) or "no metrics"
    planned = run.setting("federation.num_rounds") or last.round
    if run.summary is None:
        return f"**This run did not finish**: its folder holds {last.round} of {planned} rounds and no summary. Last: {result}."
    return f"{run.method}, {last.round} of {plural(planned, 'round')} in {human_seconds(run.summary['wall_s'])}: {result}."


def _what_ran(run: Run) -> str:
    summary = run.summary or {}
    # A run without adapters has no rank, whatever its configuration says.
    unused: tuple[str, ...] = OF_ADAPTERS if summary.get("rank", 0) is None else ()
    unused += () if run.setting("privacy.unit") in ("example", "client") else OF_PRIVACY
    body = [(label, ", ".join(shown)) for label, keys in SETTINGS if label not in unused and (shown := _shown(run, keys))]
    if "trained_params" in summary:
        body.append(("trained parameters", f"{summary['trained_params']:,}"))
    if "factors_sha256" in summary:
        body.append(("factors sha256", f"`{summary['factors_sha256']}`"))
    return _table(("setting", "value"), body) + "\n\nThe whole configuration is in `config.yaml`."


def _shown(run: Run, keys: Sequence[str]) -> list[str]:
    found = {key.rsplit(".", 1)[-1]: run.setting(key) for key in keys}
    if len(keys) == 1:
        return [str(value) for value in found.values() if value is not None]
    return [
        str(value) if name in ("kind", "name", "optimizer") else f"{name} {value}" for name, value in found.items() if value is not None
    ]


def _rounds(run: Run) -> str:
    metrics = metric_names(run.records)
    on_clients = list(dict.fromkeys(name for record in run.records for name in mean_over_clients(record)))
    extras = list(dict.fromkeys(name for record in run.records for name in record.extras))
    head = ["round", *metrics, *(f"{name} on clients" for name in on_clients), "train loss", "clients", "failed", "up", "down", "one-off"]
    head += ["overhead", "gap", *extras, "time"]
    return _table(head, [_round(record, metrics, on_clients, extras) for record in run.records])


def _round(record: RoundRecord, metrics: list[str], on_clients: list[str], extras: list[str]) -> list[object]:
    counts = (record.payload_up, record.payload_down, record.payload_one_off, record.overhead)
    return [
        record.round,
        *(_or_dash(record.metrics.get(name)) for name in metrics),
        *(_or_dash(mean_over_clients(record).get(name)) for name in on_clients),
        _or_dash(record.train_loss),
        len(record.clients),
        len(record.failed),
        *map(human_bytes, counts),
        "–" if record.exactness_gap is None else gap_text(record.exactness_gap),
        *(f"{record.extras[name]:.4g}" if name in record.extras else "–" for name in extras),
        human_seconds(record.wall_s),
    ]


def _or_dash(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else number(value)


def _clients(run: Run) -> str:
    spread, (head, rows) = spread_rows(run.records), client_rows(run)
    shown = _table(("metric on clients", "mean", "standard deviation", "worst"), spread) if spread else UNMEASURED
    return "\n\n".join(filter(None, [partition_text(run), shown, _table(head, rows) if rows else ""]))


def _communication(run: Run) -> str:
    sums = totals(run.records)
    labels = {
        "payload_up": "up",
        "payload_down": "down",
        "payload_one_off": "one-off",
        "payload_total": "**total with the one-off**",
        "payload_total_without_one_off": "total without the one-off",
        "overhead": "overhead of serialisation, not in the totals",
    }
    body = [(label, f"{sums[key]:,}", human_bytes(sums[key])) for key, label in labels.items()]
    return _table(("summed over clients and rounds", "bytes", ""), body)


def _exactness(run: Run) -> str:
    gap = largest_gap(run.records)
    return "The exactness gap was not measured." if gap is None else EXACTNESS.format(gap=f"**{gap_text(gap)}**")


def _privacy(run: Run, images: Sequence[str] = ()) -> str:
    accounts = accounts_of(run)
    head, rows, rest = account_rows(accounts)
    table = [_table(head, rows)] if rows else []
    return "\n\n".join(filter(None, [claim_text(run), *table, rest, *images]))


def _failures(run: Run) -> str:
    body = [(record.round, name, reason) for record in run.records for name, reason in record.failed.items()]
    return _table(("round", "client", "reason"), body) if body else "No reply was lost or dropped."


def _versions(run: Run) -> str:
    found: Mapping[str, Any] = (run.summary or {}).get("versions", {})
    return _table(("package", "version"), found.items()) if found else "Not recorded."


def _results(runs: Sequence[Run]) -> str:
    metrics = list(dict.fromkeys(name for run in runs for name in metric_names(run.records)))
    head = ["run", "rounds", *metrics, "up", "down", "one-off", "total", "trained", "gap", "epsilon", "time", "folder"]
    return _table(head, [_result(run, label, metrics) for run, label in zip(runs, run_labels(runs), strict=True)])


def _result(run: Run, label: str, metrics: Sequence[str]) -> list[object]:
    summary, final, sums = run.summary or {}, final_metrics(run.records), totals(run.records)
    gap = largest_gap(run.records)
    return [
        label if run.summary else f"{label} (did not finish)",
        run.records[-1].round,
        *(_or_dash(final.get(name)) for name in metrics),
        *(human_bytes(sums[key]) for key in ("payload_up", "payload_down", "payload_one_off", "payload_total")),
        f"{summary['trained_params']:,}" if summary else "–",
        "–" if gap is None else gap_text(gap),
        epsilon_text(summary) if summary else "–",
        human_seconds(sum(record.wall_s for record in run.records)),
        f"`{run.path}`",
    ]


def _differences(runs: Sequence[Run]) -> str:
    flat = [dict(_flatten(run.config)) for run in runs]
    keys = [key for key in dict.fromkeys(key for row in flat for key in row) if len({row.get(key, "–") for row in flat}) > 1]
    if not keys:
        return "None."
    return _table(("setting", *run_labels(runs)), [(f"`{key}`", *(row.get(key, "–") for row in flat)) for key in keys])


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif key != "output":
            yield f"{prefix}{key}", str(value)
