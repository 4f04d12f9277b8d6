"""What is made of a run's rounds: what they are measured by, who listens to them, and what is left at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.app import ArrayRecord, MetricRecord

from fedsb.app.assembly import every_core, skew_in, task_of, test_features
from fedsb.app.export_run import export_run
from fedsb.app.listener import RunListener
from fedsb.app.prepare import Prepared
from fedsb.app.private_run import open_accounts
from fedsb.core.cohort import evaluated_rounds
from fedsb.core.state import State, sha256, unpack
from fedsb.models.evaluate import evaluate
from fedsb.report.progress import Progress
from fedsb.report.report import write_report
from fedsb.report.summary import build_summary
from fedsb.run.checkpoint import Memory
from fedsb.run.folder import RunFolder
from fedsb.run.resuming import fingerprint
from fedsb.wire.arrays import decode_arrays


def listener_of(prepared: Prepared, folder: RunFolder, progress: Progress, memory: Callable[[], Memory]) -> RunListener:
    """Return the listener of a run, whose checkpoints hold ``memory``; under client-level privacy the server's ledger is charged by it."""
    claim, books = open_accounts(prepared.config, folder.path, prepared.plans, prepared.server_plan)
    if books is not None and prepared.strategy.participation.client_privacy is not None:
        books.simulated = lambda: prepared.strategy.simulated
        prepared.strategy.participation.client_privacy.charge = books.charge
    strategy = prepared.strategy
    return RunListener(
        folder,
        progress,
        claim,
        simulated=lambda: strategy.simulated,
        server_accounts=books.accounts if books else None,
        memory=memory,
        run=fingerprint(prepared.config),
        keep=prepared.config.keep_checkpoints,
    )


def evaluator(prepared: Prepared) -> Any:
    """Return Flower's ``evaluate_fn``: the server's test split under the current state, in rounds that are to be evaluated."""
    config = prepared.config
    task, features = task_of(config), test_features(config)
    due = evaluated_rounds(config.eval.every, config.federation.num_rounds)

    def evaluate_fn(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round not in due or not prepared.adapted.spec.has_global_model:
            return None
        adapted = prepared.adapted
        adapted.install(unpack(decode_arrays(arrays), adapted.layouts.down), prepared.strategy.frozen.view())
        with every_core():
            return MetricRecord(evaluate(adapted, task, features, train=config.train))  # type: ignore[arg-type]

    return evaluate_fn


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
        trained_params=adapted.layouts.learnt.numel,
        records=listener.records,
        factors_sha256=sha256(state, *strategy.frozen.deltas().values()),
        wall_s=wall_s,
        held_modules=strategy.gap.sample,
        epsilon=listener.claim.final(simulated=strategy.simulated),
        epsilon_reason=listener.claim.why_none(),
        partition=_partition(prepared),
    )
    write_report(folder.path, summary, plots=config.plots)
    folder.write_summary(summary)
    return summary


def _partition(prepared: Prepared) -> dict[str, object] | None:
    """Return how examples are dealt out, in a simulation without privacy: labels and sizes are what others protect."""
    shown = prepared.strategy.simulated and prepared.config.privacy.unit == "none"
    skew = skew_in(prepared.config) if shown else None
    return None if skew is None else skew.as_dict()
