"""What a run prints: one line a round, one table at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedsb.report.series import LOWER_IS_BETTER, mean_over_clients
from fedsb.run.records import RoundRecord

MAX_WIDTH = 100
FINGERPRINT = "factors sha256"
UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def human_bytes(count: float) -> str:
    """Write a number of bytes in decimal units with one digit behind the point: ``9.2 kB``."""
    # 999,950 is already 1.0 MB: the unit is chosen for the rounded figure.
    power = next((i for i in range(len(UNITS)) if round(abs(count) / 1000**i, 1 if i else 0) < 1000), len(UNITS) - 1)
    return f"{count / 1000**power:.{1 if power else 0}f} {UNITS[power]}"


def human_seconds(seconds: float | None) -> str:
    """Write a duration: ``0.4 s``, ``21 s``, ``3 min 5 s``, ``2 h 10 min``; a dash where it is not told."""
    if seconds is None:
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def number(value: float) -> str:
    """Write a metric: three digits behind the point, or four significant ones where it is large or tiny."""
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1000 or not math.isfinite(value) else f"{value:.4g}"


def metric_text(name: str, value: float | None) -> str:
    """Write a metric by its name: a count is whole."""
    return f"{value:.0f}" if name == "examples" and value is not None else number(math.nan if value is None else value)


def bound(value: float | None) -> str:
    """Write an epsilon with two digits, rounded up: it is an upper bound. JSON holds null for an infinite one."""
    # 3.0000000000000004 is the rounding of a float and no larger claim.
    return "inf" if value is None or math.isinf(value) else f"{math.ceil(value * 100 - 1e-9) / 100:.2f}"


def gap_text(gap: float | None) -> str:
    """Write an exactness gap."""
    return "not measured" if gap is None else f"{gap:.1e}"


def gaps_text(gap: float | None, held: float | None, error: float | None = None) -> str:
    """Write an exactness gap, its relative standard error where it is an estimate, and that of the held weights where it is another."""
    text = gap_text(gap)
    told = f"{text} ± {max(error, 0.01):.0%}" if error else text
    return told if held is None or gap_text(held) == text else f"{told}, held {gap_text(held)}"


def plural(count: int, noun: str) -> str:
    """Write a count with its noun."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def failures_text(failed: Mapping[str, str], most: int = 3) -> str:
    """Name the failed clients and why, the first few of them."""
    named = "; ".join(f"{name}: {' '.join(reason.split())}" for name, reason in list(failed.items())[:most])
    rest = len(failed) - most
    return f"{len(failed)} failed ({named}{f'; and {rest} more' if rest > 0 else ''})"


def round_line(record: RoundRecord, num_rounds: int) -> str:
    """Tell a round in one line; a part that the round does not have is left out."""
    width = len(str(num_rounds))
    parts = [f"round {record.round:>{width}}/{num_rounds}"]
    parts += [f"{name} {metric_text(name, value)}" for name, value in record.metrics.items()]
    parts += [f"on clients: {name} {number(value)}" for name, value in list(mean_over_clients(record).items())[:1]]
    if record.train_loss is not None:
        parts.append(f"train loss {number(record.train_loss)}")
    if record.clients:
        parts.append(plural(len(record.clients), "client"))
    if record.failed:
        parts.append(failures_text(record.failed))
    payloads = {"up": record.payload_up, "down": record.payload_down, "one-off": record.payload_one_off}
    parts += [f"{way} {human_bytes(count)}" for way, count in payloads.items() if count]
    if record.exactness_gap is not None:
        parts.append(f"gap {gaps_text(record.exactness_gap, record.held_gap, record.gap_error)}")
    if record.epsilon is not None:
        parts.append(f"epsilon {bound(record.epsilon['max'])}")
    return "  ".join([*parts, *([] if record.wall_s is None else [human_seconds(record.wall_s)])])


def epsilon_text(summary: Mapping[str, Any]) -> str:
    """Write epsilon with all that it depends on, or why there is none."""
    epsilon = summary.get("epsilon")
    if epsilon is None:
        return f"not claimed ({summary.get('epsilon_reason') or 'no reason recorded'})"
    most, least = bound(epsilon["max"]), bound(epsilon["min"])
    spread = most if epsilon["max"] == epsilon["min"] else f"at most {most}, at least {least}"
    note = ", simulated" if epsilon.get("simulated") else ""
    text = f"{spread} per {epsilon['unit']} at delta {epsilon['delta']:.1e} ({epsilon['accountant']}{note})"
    if epsilon["max"] is not None and epsilon["max"] > (epsilon.get("target") or math.inf):
        text += f"; more than this run's target of {epsilon['target']:g}, as earlier runs on a node's data count too"
    if silent := epsilon.get("silent"):
        text += f"; not known of {plural(len(silent), 'client')} that did not answer last"
    return text


def noise_text(summary: Mapping[str, Any]) -> str:
    """Write the noise multiplier of the training, or its spread over the clients."""
    noise = (summary.get("epsilon") or {}).get("noise_multiplier")
    if not noise:
        return ""
    spread = f"{noise['min']:.3g}" if noise["max"] == noise["min"] else f"{noise['min']:.3g} to {noise['max']:.3g}"
    return f"multiplier {spread}"


def uncovered_text(summary: Mapping[str, Any]) -> str:
    """Write what epsilon does not cover."""
    return str((summary.get("epsilon") or {}).get("not_covered", ""))


def _on_clients(summary: Mapping[str, Any]) -> str:
    """Write the first metric of the clients that is no loss: mean, spread and worst."""
    found = summary.get("client_metrics") or {}
    name = next((name for name in found if name not in LOWER_IS_BETTER), next(iter(found), None))
    if name is None:
        return ""
    row = found[name]
    return f"{name} {number(row['mean'])} ± {number(row['std'])}, worst {number(row['worst'])} ({row['worst_client']})"


def selected_text(selected: Mapping[str, Any]) -> str:
    """Say which round was chosen, by what, and whether the run stopped for want of a better one."""
    value = metric_text(selected["metric"], selected["value"])
    early = "; the run ended early, without a gain since" if selected["stopped"] else ""
    return f"round {selected['round']}, the best by {selected['metric']} on the validation part ({value}){early}"


def _rounds(summary: Mapping[str, Any]) -> str:
    done, planned = summary.get("rounds_done", summary["rounds"]), summary["rounds"]
    return plural(planned, "round") if done == planned else f"{done} of {plural(planned, 'round')}"


def _method(summary: Mapping[str, Any]) -> str:
    rank = "no adapters" if summary["rank"] is None else f"rank {summary['rank']}"
    return f"{summary['method']}, {rank}, {summary['trained_params']:,} trained parameters"


# Label, and how it reads off a summary.
ROWS: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("method", _method),
    ("model", lambda s: str(s["model"])),
    ("data", lambda s: str(s["data"])),
    ("federation", lambda s: f"{plural(s['clients'], 'client')}, {_rounds(s)}, seed {s['seed']}"),
    ("result", lambda s: "  ".join(f"{name} {metric_text(name, v)}" for name, v in s["metrics"].items()) or "not measured"),
    ("chosen", lambda s: selected_text(s["selected"]) if s.get("selected") else ""),
    ("on clients", _on_clients),
    ("up", lambda s: human_bytes(s["payload_up"])),
    ("down", lambda s: human_bytes(s["payload_down"])),
    ("one-off", lambda s: human_bytes(s["payload_one_off"])),
    ("total", lambda s: f"{human_bytes(s['payload_total'])}, without the one-off {human_bytes(s['payload_total_without_one_off'])}"),
    ("overhead", lambda s: human_bytes(s["overhead"])),
    ("exactness gap", lambda s: gaps_text(s["exactness_gap"], s.get("held_gap"), s.get("gap_error"))),
    ("epsilon", epsilon_text),
    ("noise", noise_text),
    ("not covered", uncovered_text),
    ("failures", lambda s: str(s["failures"])),
    ("time", lambda s: "" if s["wall_s"] is None else human_seconds(s["wall_s"])),
    (FINGERPRINT, lambda s: str(s["factors_sha256"])),
)


def rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the summary as label and text; a row that the run has nothing for is left out."""
    return [(label, shown) for label, text in ROWS if (shown := text(summary))]


def print_summary(summary: Mapping[str, Any], folder: str | Path, console: Console | None = None) -> None:
    """Print the final table, at most 100 columns wide, and below it what must not be broken: the folder, and a hash that is wider."""
    out = console or Console()
    if not out.is_terminal:
        # Rich takes 80 columns for a pipe, which has no width.
        out = Console(file=out.file, width=MAX_WIDTH, no_color=True)
    table = Table(show_header=False, box=box.ROUNDED if out.is_terminal else box.ASCII)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    shown = dict(rows(summary))
    width = min(out.width, MAX_WIDTH)
    # A hash that is broken over two lines can't be copied.
    below = {label: shown.pop(label) for label in (FINGERPRINT,) if width < len(label) + len(shown[label]) + 7}
    for label, text in shown.items():
        table.add_row(label, Text(text))
    out.print(table, width=width)
    for label, text in {**below, "run folder": str(folder)}.items():
        out.print(Text(f"{label}: {text}"), soft_wrap=True)
    out.file.flush()
