"""Who listens to a run's rounds, and what is left of them at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from fedsb.app.assembly import skew_in
from fedsb.app.exports.at_end import export_run
from fedsb.app.listener import RunListener
from fedsb.app.measuring.scoring import predictions, samples
from fedsb.app.own_factors import made_again
from fedsb.app.prepare import Prepared
from fedsb.app.private_run import open_accounts
from fedsb.app.threads import every_core
from fedsb.config.schema import Config
from fedsb.core.errors import RunError
from fedsb.core.state import State
from fedsb.report.progress import Progress
from fedsb.report.report import write_report
from fedsb.report.selection import Selection
from fedsb.report.summary import build_summary
from fedsb.report.table import human_bytes, metric_text, plural, selected_text
from fedsb.run.checkpoint import Carried, load_checkpoint
from fedsb.run.folder import RunFolder
from fedsb.run.predictions import write_predictions
from fedsb.run.resuming import fingerprint
from fedsb.trackers import Feed
from fedsb.wire.frozen import FrozenLog

LOG = logging.getLogger(__name__)


def listener_of(
    prepared: Prepared,
    folder: RunFolder,
    progress: Progress,
    carried: Callable[[], Carried],
    feed: Feed | None = None,
    validated: Mapping[int, Mapping[str, float]] | None = None,
) -> RunListener:
    """Return the listener of a run; under client-level privacy the server's ledger is charged by it.

    Args:
        prepared: the run.
        folder: its folder.
        progress: shows it.
        carried: gives what its checkpoints hold.
        feed: gets its records too.
        validated: what each round was measured at on the validation part.
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
        selection=selection_of(prepared.config),
        validated=validated,
    )


def selection_of(config: Config) -> Selection | None:
    """Return by what the run chooses a round; None where its last one is what it leaves."""
    return Selection.of(config.eval.select, config.eval.direction, config.eval.patience)


def _left_by(prepared: Prepared, folder: RunFolder, listener: RunListener, state: State) -> tuple[State, FrozenLog]:
    """Return what the run leaves, of its chosen round or its last: the state, and the frozen log that it stands on.

    Raises:
        RunError: the checkpoint of the chosen round can't be read.
    """
    config = prepared.config
    if listener.best in (None, listener.last):
        return state, prepared.strategy.frozen
    try:
        snapshot = load_checkpoint(folder.checkpoints, run=fingerprint(config), number=listener.best)
    except FileNotFoundError:
        raise RunError(f"the checkpoint of round {listener.best}, which was chosen, is not there any more") from None
    snapshot.frozen.bring(made_again(config, prepared.adapted, snapshot))
    return snapshot.state, snapshot.frozen


def finish(prepared: Prepared, folder: RunFolder, listener: RunListener, state: State, wall_s: float) -> dict[str, Any]:
    """Export the adapter, write the report, and last the summary, by which the run has finished."""
    config, adapted, strategy = prepared.config, prepared.adapted, prepared.strategy
    state, frozen = _left_by(prepared, folder, listener, state)
    adapted.install(state, frozen.view())
    if config.eval.select:
        left = listener.last if listener.best is None else listener.best
        with every_core():
            write_predictions(folder.path, predictions(config, samples(config, adapted, left), left))
    chosen = listener.selected
    export_run(config, adapted, folder, f"The adapter of {selected_text({**chosen, 'stopped': False})}." if chosen else "")
    if chosen:
        listener.say(f"the model that is left is that of {selected_text(chosen)}")
    elif config.eval.select:
        listener.say(f"the model that is left is the last: no round has a finite {config.eval.select} on the validation part")
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
        factors_sha256=frozen.sha256(state),
        wall_s=wall_s,
        held_modules=strategy.gap.sample,
        epsilon=listener.claim.final(simulated=strategy.simulated),
        epsilon_reason=listener.claim.why_none(),
        partition=_partition(prepared),
        selected=chosen,
    )
    write_report(folder.path, summary, plots=config.plots)
    folder.write_summary(summary)
    LOG.info(closing_line(summary))
    return summary


def closing_line(summary: Mapping[str, Any]) -> str:
    """Return what a run came to, in one line that tells no time: a private run of real nodes must not."""
    found = "  ".join(f"{name} {metric_text(name, value)}" for name, value in summary["metrics"].items())
    moved = f"{human_bytes(summary['payload_total'])} moved, {human_bytes(summary['payload_one_off'])} of it once"
    chosen = f", of round {summary['selected']['round']}" if summary["selected"] else ""
    return f"after round {summary['rounds_done']}{chosen}: {found or 'nothing measured'}; {plural(summary['failures'], 'failure')}; {moved}"


def _partition(prepared: Prepared) -> dict[str, object] | None:
    """Return how examples are dealt out, in a simulation without privacy: labels and sizes are what others protect."""
    shown = prepared.strategy.simulated and prepared.config.privacy.unit == "none"
    skew = skew_in(prepared.config) if shown else None
    return None if skew is None else skew.as_dict()
