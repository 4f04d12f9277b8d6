"""``comparison.html``: template, style, script, library and data in one file."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import fedsb
from fedsb.report.clients import told_apart
from fedsb.report.comparing import Comparison
from fedsb.report.datasets import apart_text, left_out_text
from fedsb.report.drawing import COLOURS, MARKERS, STYLES
from fedsb.report.markdown import write
from fedsb.report.page.charts import charts
from fedsb.report.page.skew import skew_html
from fedsb.report.page.tables import methods_table, runs_table
from fedsb.report.page.view import View, views_of
from fedsb.report.table import plural

HERE = Path(__file__).parent
LIBRARY = HERE / "library" / "plotly-basic.min.js"


def write_page(path: Path, parts: Sequence[Comparison], where: Path, left_out: Sequence[str] = ()) -> Path:
    """Write the page of a comparison, which ends up in the folder ``where``, and return where it lies now."""
    return write(path, page_text(parts, where, left_out))


def page_text(parts: Sequence[Comparison], where: Path, left_out: Sequence[str] = ()) -> str:
    """Return the page of a comparison, or of a run.

    Args:
        parts: runs over the same data, each with its figures.
        where: the folder that the file ends up in, which links to runs lead from.
        left_out: a line for each run that could not be read.
    """
    views = views_of(parts)
    made = {
        "style": _file("page.css"),
        "library": LIBRARY.read_text(encoding="utf-8"),
        "script": _file("page.js"),
        "data": _json([_data(view) for view in views]),
        "title": escape(_title(parts)),
        "lead": _lead(parts, left_out),
        "parts": "".join(_part(view, place, where) for place, view in enumerate(views)),
        "version": escape(fedsb.__version__),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: made[match[1]], _file("page.html"))


def _title(parts: Sequence[Comparison]) -> str:
    paths = {run.path for part in parts for run in part.runs}
    return f"Run {paths.pop().resolve().name}" if len(paths) == 1 else f"Comparison of {plural(len(paths), 'run')}"


@cache
def _file(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """Return JSON that may stand in a script element: no text in it ends that."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _data(view: View) -> dict[str, Any]:
    """Return what the script draws: groups with their look, which is the same in all charts, and the charts."""
    return {"groups": [_look(place, view) for place in range(len(view.groups))], "charts": charts(view)}


def _look(place: int, view: View) -> dict[str, Any]:
    lap, colour = divmod(place, len(COLOURS))
    group = view.groups[place]
    look = {"colour": COLOURS[colour], "marker": (place + lap) % len(MARKERS), "dash": lap % len(STYLES)}
    return {"label": group.label, "runs": view.runs_of(group), **look}


def _lead(parts: Sequence[Comparison], left_out: Sequence[str]) -> str:
    runs = [run for part in parts for run in part.runs]
    cut = sum(run.summary is None for run in runs)
    lead = "Bytes are summed over clients and rounds." + (f" {plural(cut, 'run')} did not finish." if cut else "")
    warnings = [apart_text({part.data: part.runs for part in parts}), left_out_text(left_out), *(told_apart(part.runs) for part in parts)]
    return f"<p>{lead}</p>" + "".join(f"<p class=warning>{_marked(line)}</p>" for line in warnings if line)


def _marked(text: str) -> str:
    """Return Markdown of one line as HTML: what is bold in it, and what is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(text)))


def _part(view: View, place: int, where: Path) -> str:
    title = f"<h2>Data: {escape(view.comparison.data)}</h2>"
    care = "".join(f"<li>{_marked(line)}</li>" for line in view.comparison.remarks)
    sections = {
        "Methods": methods_table(view),
        "Read with care": f"<ul>{care}</ul>" if care else "",
        "Charts": f'<div class="legend" data-part="{place}"></div><div class="charts" data-part="{place}"></div>',
        "How examples are dealt out": skew_html(view),
        "Runs": runs_table(view, where),
    }
    shown = "".join(f"<section><h3>{name}</h3>{html}</section>" for name, html in sections.items() if html)
    return f'<div class="part" id="part-{place}">{title}{shown}</div>'
