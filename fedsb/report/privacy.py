"""The privacy section of a run's report: what is claimed, for whom, and in a simulation how much of the updates the noise left."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedsb.privacy.claim import NO_MECHANISM, NOT_COVERED
from fedsb.report.table import bound, epsilon_text, uncovered_text
from fedsb.run.folder import Run
from fedsb.run.records import RoundRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 20
UNPROTECTED = "**No privacy mechanism: epsilon is not claimed.** Updates left the clients without clipping or noise."
UNCLAIMED = "**Epsilon is not claimed**: {reason}."
NO_GUARANTEE = (
    "Raw data stayed where it was, but that is no guarantee: who sees a client's update or the final model may be able to tell whether an "
    "example was trained on, or to recover parts of it. Do not describe this run as private."
)
PRIVACY = "Epsilon is {epsilon}. Not covered: {uncovered}.{simulated}"
SIMULATED = " The noise of a simulation comes from the seed: the figure is what a real federation would have, and protects nobody here."
UNFINISHED = "The run did not finish, so no epsilon of a whole run was computed: none is claimed."
LAST_KNOWN = " The last known, after round {round}, is {epsilon}; what was under way when it stopped may have cost more."
# Heading, and the key of a client's account.
COLUMNS: tuple[tuple[str, str], ...] = (
    ("epsilon", "epsilon"),
    ("delta", "delta"),
    ("noise multiplier", "noise-multiplier"),
    ("sampling rate", "sampling-rate"),
    ("steps a round", "steps"),
)
PANELS: dict[str, tuple[str, str]] = {
    "clip_rate": ("Clip rate", "share of what was clipped"),
    "signal_to_noise": ("Signal-to-noise", "norm of the sum / norm of its noise"),
}


def claim_text(run: Run) -> str:
    """Return what the run claims, or why it claims nothing."""
    if run.summary is None:
        return UNFINISHED + _last_known(run.records)
    epsilon = run.summary.get("epsilon")
    if epsilon is None:
        reason = run.summary.get("epsilon_reason") or "no reason was recorded"
        return f"{UNPROTECTED if reason == NO_MECHANISM else UNCLAIMED.format(reason=reason)} {NO_GUARANTEE}"
    shown = f"**{epsilon_text(run.summary)}**"
    return PRIVACY.format(
        epsilon=shown,
        uncovered=uncovered_text(run.summary) or NOT_COVERED.get(str(epsilon.get("unit")), "see the documentation"),
        simulated=SIMULATED if epsilon.get("simulated") else "",
    )


def _last_known(records: Sequence[RoundRecord]) -> str:
    known = next((record for record in reversed(records) if record.epsilon is not None), None)
    return "" if known is None else LAST_KNOWN.format(round=known.round, epsilon=epsilon_text({"epsilon": known.epsilon}))


def accounts_of(run: Run) -> Mapping[str, Mapping[str, Any]]:
    """Return the clients' accounts as last known, the largest epsilon first."""
    last = next((record.epsilon for record in reversed(run.records) if record.epsilon is not None), None)
    found: Mapping[str, Any] = (((run.summary or {}).get("epsilon") if run.summary else last) or {}).get("clients", {})
    return dict(sorted(found.items(), key=lambda item: (-_sortable(item[1].get("epsilon")), item[0])))


def _sortable(epsilon: float | None) -> float:
    return math.inf if epsilon is None else epsilon


def account_rows(accounts: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]], str]:
    """Return head and rows of the table of clients, and what stands below it where there are more of them than rows.

    A column that no account has is left out: the server's own releases sample nothing.
    """
    columns = [(label, key) for label, key in COLUMNS if any(key in account for account in accounts.values())]
    shown = list(accounts.items())[:MOST_ROWS]
    rows = [[client, *(_figure_of(key, account) for _, key in columns)] for client, account in shown]
    rest = len(accounts) - len(shown)
    return ["client", *(label for label, _ in columns)], rows, f"and {rest} more" if rest > 0 else ""


def _figure_of(key: str, account: Mapping[str, Any]) -> str:
    if key not in account:
        return "–"
    value = account[key]
    return bound(value) if key == "epsilon" else f"{value:.0f}" if key == "steps" else f"{value:.3g}"


def has_noise_figures(run: Run) -> bool:
    """Return whether the run noted clip rate or signal-to-noise, as only a simulation does."""
    return any(key in record.simulation_only for record in run.records for key in PANELS)


def draw_noise(axes: Sequence[Axes], run: Run, colours: Sequence[str], dress: Callable[[Axes, str, str, str], None]) -> None:
    """Draw clip rate and signal-to-noise, round by round; ``dress`` gives an axis its title and labels."""
    from matplotlib.ticker import MaxNLocator

    for ax, (key, (title, unit)), colour in zip(axes, PANELS.items(), colours, strict=False):
        pairs = [(record.round, record.simulation_only[key]) for record in run.records if key in record.simulation_only]
        ax.plot([number for number, _ in pairs], [value for _, value in pairs], marker="o", color=colour)
        dress(ax, f"{title} (simulation only)", "round", unit)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes[0].set_ylim(-0.03, 1.03)
    _scale_ratio(axes[1], run)


def _scale_ratio(ax: Axes, run: Run) -> None:
    """Make the axis of signal-to-noise logarithmic, with room for the line at 1."""
    ratios = [v for record in run.records if math.isfinite(v := record.simulation_only.get("signal_to_noise", math.nan)) and v > 0]
    if ratios:
        ax.set_yscale("log")
        ax.set_ylim(0.5 * min(1.0, *ratios), 2.0 * max(1.0, *ratios))
    mark_level(ax, 1.0, "as much signal as noise")


def mark_level(ax: Axes, level: float, text: str) -> None:
    """Draw a dashed line across a plot, with its meaning above its right end."""
    ax.axhline(level, color="#666666", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    ax.annotate(
        text,
        (0.99, level),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color="#666666",
    )
