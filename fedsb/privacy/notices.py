"""What a private run says before its first round."""

from __future__ import annotations

from collections.abc import Collection

from fedsb.privacy.claim import NOT_COVERED
from fedsb.privacy.plan import Plan, ServerPlan

PROTECTS = {
    "example": "one training example of one client, against the server, the other clients and every reader of the model",
    "client": "one client's whole data, against every reader of the model; the server is trusted",
}


def privacy_lines(
    unit: str,
    plans: Collection[Plan | ServerPlan],
    *,
    start: str | None,
    evidence: str,
    reason: str | None,
    calibrated: bool,
    budget: float | None = None,
) -> list[str]:
    """Return the lines: what is protected and what is not, the noise, what the start costs, why nothing can be claimed, the budget.

    Args:
        unit: ``none``, ``example`` or ``client``.
        plans: of the simulated clients, or the server's; empty where the server does not know them.
        start: ``init.kind`` as resolved.
        evidence: ``init.evidence``.
        reason: why no epsilon can be claimed, or None.
        calibrated: whether the noise follows from a target epsilon, and was not given itself.
        budget: what a client may spend over its whole ledger, or None.
    """
    if unit == "none":
        return []
    lines = [f"privacy: per {unit}: protects {PROTECTS[unit]}; not covered: {NOT_COVERED[unit]}"]
    if noises := sorted(plan.training.noise_multiplier for plan in plans if plan.training.noise_multiplier):
        spread = f"{noises[0]:.3g}" if noises[0] == noises[-1] else f"{noises[0]:.3g} to {noises[-1]:.3g}"
        lines.append(f"privacy: noise multiplier {spread}, {'calibrated to the whole schedule' if calibrated else 'as given'}")
    lines += _large_delta(plans)
    if evaluations := [plan.evaluation.noise_multiplier for plan in plans if isinstance(plan, Plan) and plan.evaluation is not None]:
        lines.append(f"privacy: metrics on held-out examples have noise too, multiplier up to {max(evaluations):.3g}, and are charged")
    if reason is not None:
        lines.append(f"privacy: no epsilon will be claimed: {reason}")
    elif start is not None and (start != "gradient" or evidence == "public"):
        what = "the server's public text" if start == "gradient" else "no data"
        lines.append(f"privacy: the start ({start}) uses {what} and costs nothing")
    if budget is not None:
        # Whoever ships the app could leave the check out.
        lines.append(
            f"privacy: a client refuses what takes its ledger above epsilon {budget:g}; advisory on a real node, whose app comes from here"
        )
    return lines


def _large_delta(plans: Collection[Plan | ServerPlan]) -> list[str]:
    """Warn of a delta that is allowed and says little: publishing one of a hundred outright satisfies one of 1/100."""
    largest = max(plans, key=lambda plan: plan.delta * plan.count, default=None)
    if largest is None or not largest.delta * largest.count > 0.1 * (1 + 1e-9):
        return []
    whose = f"{largest.count} {'examples of a client' if isinstance(largest, Plan) else 'clients'}"
    return [
        f"privacy: warning: delta {largest.delta:.3g} is above 0.1/n for the {whose}: to publish one of them with probability "
        f"{min(1.0, largest.delta * largest.count):.2g} satisfies it; privacy.delta=null takes at most 0.1/n"
    ]


def forecast_line(snr: float, noise_multiplier: float) -> str:
    """Return the line on a private start's chances, known before any data is touched."""
    verdict = "" if snr > 1 else ": noise will dominate it; a data-free start or public text is the better choice"
    return f"privacy: the start's sketch has a signal-to-noise of at most {snr:.2g} (noise multiplier {noise_multiplier:.3g}){verdict}"
