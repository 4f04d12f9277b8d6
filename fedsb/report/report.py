"""``report.md`` of a run: made from its folder alone, so it can be made again at any time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsb.core.folders import filled_whole
from fedsb.report.clients import UNMEASURED, by_clients, client_rows, partition_text, spread_rows, spread_text
from fedsb.report.markdown import document, or_dash, table, write
from fedsb.report.plots import plot_run
from fedsb.report.privacy import account_rows, accounts_of, claim_text
from fedsb.report.secure import rounding_text, secured_text
from fedsb.report.series import largest_gap, mean_over_clients, metric_names, metrics_of, totals
from fedsb.report.table import gap_text, gaps_text, human_bytes, human_seconds, metric_text, plural, selected_text
from fedsb.run.folder import Run, read_run
from fedsb.run.records import RoundRecord, finite

# Label, and the settings that it shows; one that the run's configuration lacks is left out.
SETTINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("method", ("method.name",)),
    ("options of the method", ("method.options",)),
    ("options of its adapters", ("adapter.options",)),
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
    ("evaluation", ("eval.every", "eval.max_examples")),
    ("scores", ("eval.scores", "eval.scorer", "eval.max_new_tokens", "eval.temperature")),
    ("server optimiser", ("federation.server_optimizer.name",)),
    ("privacy", ("privacy.unit", "privacy.epsilon", "privacy.noise_multiplier", "privacy.max_epsilon")),
    ("clipping", ("privacy.clipping", "privacy.max_grad_norm")),
    ("wire", ("federation.wire_dtype",)),
    ("seed", ("seed",)),
)
OF_ADAPTERS = ("rank", "start", "adapted layers")
OF_SCORES = ("scores",)
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
    "and the true weighted mean of theirs, before any server optimiser, clipping or noise. Float32 rounding of trained factors alone stays "
    "below 1e-5."
)
ESTIMATED = " It is an estimate by random probes, with a relative standard error of at most {error:.1%}."
HELD = (
    "That is of the factors. Of the weights that clients compute with it is {gap}, measured {where}: what is added to frozen weights is "
    "rounded as `frozen.hold` says."
)

UNMEASURED_GAP = "The exactness gap was not measured."
OWN = (
    "The metrics are the mean over the clients, each on the part that it holds out, weighted by its examples; the columns *on clients* "
    "count each client once."
)


def write_report(folder: str | Path, summary: Mapping[str, Any] | None = None, *, plots: bool = True) -> Path:
    """Write ``report.md`` and its plots into a run's folder.

    Args:
        folder: of the run.
        summary: of a run that is about to write it; by default the folder's own.
        plots: whether to draw them.

    Raises:
        UserError: the folder holds no run.
    """
    run = read_run(folder)
    if summary is not None:
        run = replace(run, summary=finite(summary))
    with filled_whole(run.path) as scratch:
        written = write(scratch / "report.md", report_text(run, plot_run(folder, scratch) if plots else ()))
    return run.path / written.name


def report_text(run: Run, plots: Sequence[Path] = ()) -> str:
    """Return a run's report in Markdown, showing ``plots``, which lie beside it."""
    images = {plot.stem: f"![{plot.stem.replace('_', ' ')}]({plot.name})\n\n*{CAPTIONS[plot.stem]}*" for plot in plots}
    noise = images.pop("noise", "")
    sections = {
        "What ran": _what_ran(run),
        "Rounds": "\n\n".join([_rounds(run), *images.values()]),
        "Clients": _clients(run),
        "Communication": communication_text(run),
        "Exactness": exactness_text(run),
        "Privacy": _privacy(run, [noise]),
        "Failures": _failures(run),
        "Versions": _versions(run),
    }
    return document(f"Run {run.path.resolve().name}", _lead(run), sections)


def _lead(run: Run) -> str:
    last = run.records[-1]
    result = (
        ", ".join(f"{name} **{metric_text(name, value)}**" for name, value in metrics_of(run.records, run.summary).items()) or "no metrics"
    )
    planned = run.setting("federation.num_rounds") or last.round
    if run.summary is None:
        return f"**This run did not finish**: its folder holds {last.round} of {planned} rounds and no summary. Last: {result}."
    took = "" if run.summary["wall_s"] is None else f" in {human_seconds(run.summary['wall_s'])}"
    chosen = f" They are of {selected_text(run.summary['selected'])}, as is the model." if run.summary.get("selected") else ""
    return f"{run.method}, {last.round} of {plural(planned, 'round')}{took}: {result}.{chosen}"


def _what_ran(run: Run) -> str:
    summary = run.summary or {}
    # A run without adapters has no rank, whatever its configuration says.
    unused: tuple[str, ...] = OF_ADAPTERS if summary.get("rank", 0) is None else ()
    unused += () if run.setting("eval.scores") else OF_SCORES
    unused += () if run.setting("privacy.unit") in ("example", "client") else OF_PRIVACY
    body = [(label, ", ".join(shown)) for label, keys in SETTINGS if label not in unused and (shown := _shown(run, keys))]
    if "trained_params" in summary:
        body.append(("trained parameters", f"{summary['trained_params']:,}"))
    if "factors_sha256" in summary:
        body.append(("factors sha256", f"`{summary['factors_sha256']}`"))
    return table(("setting", "value"), body) + "\n\nThe whole configuration is in `config.yaml`."


def _shown(run: Run, keys: Sequence[str]) -> list[str]:
    found = {key.rsplit(".", 1)[-1]: run.setting(key) for key in keys}
    options = found.get("options")
    if isinstance(options, Mapping):
        return [f"{name} {value}" for name, value in options.items() if value is not None]
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
    body = table(head, [_round(record, metrics, on_clients, extras) for record in run.records])
    return f"{body}\n\n{OWN}" if by_clients(run) else body


def _round(record: RoundRecord, metrics: list[str], on_clients: list[str], extras: list[str]) -> list[object]:
    counts = (record.payload_up, record.payload_down, record.payload_one_off, record.overhead)
    return [
        record.round,
        *(or_dash(record.metrics.get(name), name) for name in metrics),
        *(or_dash(mean_over_clients(record).get(name)) for name in on_clients),
        or_dash(record.train_loss),
        len(record.clients),
        len(record.failed),
        *map(human_bytes, counts),
        "–" if record.exactness_gap is None else gaps_text(record.exactness_gap, record.held_gap, record.gap_error),
        *(f"{record.extras[name]:.4g}" if name in record.extras else "–" for name in extras),
        human_seconds(record.wall_s),
    ]


def _clients(run: Run) -> str:
    spread, (head, rows) = spread_rows(run.records), client_rows(run)
    columns = ("metric on clients", "mean", "weighted by examples", "standard deviation", "worst tenth", "worst")
    shown = table(columns, spread) if spread else UNMEASURED
    said = spread_text(run.records)
    return "\n\n".join(filter(None, [partition_text(run), shown, said, table(head, rows) if rows else ""]))


def communication_text(run: Run) -> str:
    """Return the table of a run's bytes, the one-off apart."""
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
    return table(("summed over clients and rounds", "bytes", ""), body)


def exactness_text(run: Run) -> str:
    """Return what was measured of the exactness of a run's rounds."""
    gap, held = largest_gap(run.records), largest_gap(run.records, "held_gap")
    if gap is None:
        if rounded := rounding_text(run.records):
            return rounded
        return "There is no one model to measure: each client keeps a part of its own." if by_clients(run) else UNMEASURED_GAP
    text = EXACTNESS.format(gap=f"**{gap_text(gap)}**")
    if error := largest_gap(run.records, "gap_error"):
        text += ESTIMATED.format(error=error)
    if held is None:
        return text
    names = (run.summary or {}).get("held_gap_modules")
    where = "on all adapted layers" if names is None else f"on {plural(len(names), 'layer')} drawn by the seed: {', '.join(names)}"
    return f"{text}\n\n{HELD.format(gap=f'**{gap_text(held)}**', where=where)}"


def _privacy(run: Run, images: Sequence[str] = ()) -> str:
    accounts = accounts_of(run)
    head, rows, rest = account_rows(accounts)
    shown = [table(head, rows)] if rows else []
    return "\n\n".join(filter(None, [claim_text(run), *shown, rest, secured_text(run), *images]))


def _failures(run: Run) -> str:
    body = [(record.round, name, reason) for record in run.records for name, reason in record.failed.items()]
    lost = table(("round", "client", "reason"), body) if body else "No reply was lost or dropped."
    told = [f"- Round {record.round}: {remark}" for record in run.records for remark in record.remarks]
    return "\n\n".join([lost, "\n".join(told)] if told else [lost])


def _versions(run: Run) -> str:
    found: Mapping[str, Any] = (run.summary or {}).get("versions", {})
    return table(("package", "version"), found.items()) if found else "Not recorded."
