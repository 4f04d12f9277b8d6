"""Who listens to a run's rounds, and what is left of them at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from fedsb.app.assembly import skew_in
from fedsb.app.exports.at_end import export_run
from fedsb.app.listener import RunListener
from fedsb.app.prepare import Prepared
from fedsb.app.private_run import open_accounts
from fedsb.core.state import State
from fedsb.report.progress import Progress
from fedsb.report.report import write_report
from fedsb.report.summary import build_summary
from fedsb.report.table import human_bytes, metric_text, plural
from fedsb.run.checkpoint import Carried
from fedsb.run.folder import RunFolder
from fedsb.run.resuming import fingerprint
from fedsb.trackers import Feed

LOG = logging.getLogger(__name__)


def listener_of(
    prepared: Prepared, folder: RunFolder, progress: Progress, carried: Callable[[], Carried], feed: Feed | None = None
) -> RunListener:
    """Return the listener of a run; under client-level privacy the server's ledger is charged by it.

    Args:
        prepared: the run.
        folder: its folder.
        progress: shows it.
        carried: gives what its checkpoints hold.
        feed: gets its records too.
    """
    claim, books = open_accounts(prepared.config, folder.path, prepared.plans, prepared.server_plan)
    if books is not None and prepared.strategy.participation.client_unit is not None:
        books.simulated = lambda: prepared.strategy.simulated
        prepared.strategy.participation.client_unit.charge = books.charge
    strategy = prepared.strategy
    return RunListener(
        folder,
        progress,
        claim,
        simulated=lambda: strategy.simulated,
        server_accounts=books.accounts if books else None,
        carried=carried,
        run=fingerprint(prepared.config),
        keep=prepared.config.keep_checkpoints,
        feed=feed,
    )


def finish(prepared: Prepared, folder: RunFolder, listener: RunListener, state: State, wall_s: float) -> dict[str, Any]:
    """Export the adapter, write the report, and last the summary, by which the run has finished."""
    config, adapted, strategy = prepared.config, prepared.adapted, prepared.strategy
    adapted.install(state, strategy.frozen.view())
    export_run(config, adapted, folder)
    summary = build_summary(
        method=config.method.name,
        rounds=config.federation.num_rounds,
        clients=config.federation.num_clients,
        seed=config.seed,
        model=config.model.name,
        data=config.data.path or config.data.test_path or config.data.kind,
        rank=config.adapter.rank if adapted.spec.factors else None,
        trained_params=adapted.layouts.learnt.numel if config.federation.num_rounds else 0,
        records=listener.records,
        factors_sha256=strategy.frozen.sha256(state),
        wall_s=wall_s,
        held_modules=strategy.gap.sample,
        epsilon=listener.claim.final(simulated=strategy.simulated),
        epsilon_reason=listener.claim.why_none(),
        partition=_partition(prepared),
    )
    write_report(folder.path, summary, plots=config.plots)
    folder.write_summary(summary)
    LOG.info(closing_line(summary))
    return summary


def closing_line(summary: Mapping[str, Any]) -> str:
    """Return what a run came to, in one line that tells no time: a private run of real nodes must not."""
    found = "  ".join(f"{name} {metric_text(name, value)}" for name, value in summary["metrics"].items())
    moved = f"{human_bytes(summary['payload_total'])} moved, {human_bytes(summary['payload_one_off'])} of it once"
    return f"after round {summary['rounds_done']}: {found or 'nothing measured'}; {plural(summary['failures'], 'failure')}; {moved}"


def _partition(prepared: Prepared) -> dict[str, object] | None:
    """Return how examples are dealt out, in a simulation without privacy: labels and sizes are what others protect."""
    shown = prepared.strategy.simulated and prepared.config.privacy.unit == "none"
    skew = skew_in(prepared.config) if shown else None
    return None if skew is None else skew.as_dict()
