"""The Flower ServerApp: configuration, model, strategy, start, rounds, report. The CLI runs the same :func:`serve`."""

# ruff: noqa: E402 -- the submitted code must come first on the import path before any of it is imported
from __future__ import annotations

from fedsb.core.collector import uncollected
from fedsb.core.counting import Counter, counted_by
from fedsb.runtime.fab import launch_folder, prefer_submitted_code

prefer_submitted_code()

import logging
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

with uncollected(for_good=True):
    from flwr.app import ArrayRecord, Context, MetricRecord
    from flwr.serverapp import Grid, ServerApp

    from fedsb.app.anchoring import anchored
    from fedsb.app.assembly import (
        VALIDATION,
        peopled,
        progress_of,
        run_folder,
        skew_in,
    )
    from fedsb.app.measuring.scoring import figures, predictions, samples
    from fedsb.app.opening import opening_remarks
    from fedsb.app.outcome import finish, listener_of
    from fedsb.app.prepare import Prepared, planned, prepare
    from fedsb.app.private_run import check_ledgers, opening_lines
    from fedsb.app.threads import every_core, use_threads
    from fedsb.config.compose import load, split_overrides
    from fedsb.config.schema import Config
    from fedsb.core.cohort import evaluated_rounds
    from fedsb.core.errors import RunError, UserError
    from fedsb.core.logs import EarlyLines, early_lines, run_log
    from fedsb.core.streams import spell_out
    from fedsb.run.checkpoint import Snapshot, load_checkpoint
    from fedsb.run.folder import RunFolder
    from fedsb.run.predictions import write_predictions
    from fedsb.run.resuming import fingerprint, for_nodes, resumed, sealed
    from fedsb.run.story import ending_in_one_line, told
    from fedsb.runtime.grid import SimulationGrid
    from fedsb.trackers import TRACKERS, Feed
    from fedsb.wire.arrays import decode_state, encode_arrays
    from strategies.carried import remember

LOG = logging.getLogger(__name__)
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run configuration describes; the run fails where the federation does."""
    spell_out()
    try:
        overrides = split_overrides(str(context.run_config["overrides"]))
        config = resumed(composed(overrides), overrides)
        serve(config, grid, run_folder(config, str(context.run_id)), overrides=overrides)
    except (UserError, RunError) as error:
        # Flower logs what it is raised with its traceback; a user's mistake is one line.
        print(f"error: {error}", flush=True)
        sys.tracebacklimit = 0
        raise


def composed(overrides: Sequence[str]) -> Config:
    """Return the configuration that overrides make here, with its paths and clients."""
    return peopled(anchored(load(overrides), launch_folder()))


def serve(config: Config, grid: Grid, output: Path, *, overrides: Sequence[str] | None = None) -> dict[str, Any]:
    """Run a federation over any grid and leave its outputs in a folder; one that ``config.resume`` names goes on.

    Args:
        config: the whole configuration.
        grid: Flower's, or one of :mod:`fedsb.runtime`.
        output: folder of the run.
        overrides: what the configuration was composed from; a run without them can't be resumed on real nodes.

    Returns:
        The summary.

    Raises:
        UserError: the configuration does not fit the data or the model, or the folder holds another run.
        RunError: too few clients answered, or what the run writes can't be written.
    """
    use_threads(config)
    with ending_in_one_line(output), early_lines(config.log_level) as early:
        return _serve(config, grid, output, overrides, early)


def _serve(config: Config, grid: Grid, output: Path, overrides: Sequence[str] | None, early: EarlyLines) -> dict[str, Any]:
    if config.resume is None:
        prepared = planned(prepare(config, device=_device(grid)), grid)
        folder = RunFolder(output)
        folder.write_config(sealed(config, overrides))
        folder.identity(prepared.strategy.origin)
        with folder.held():
            return _run(prepared, grid, folder, early)
    folder = RunFolder(output, resumed=True)
    with folder.held():
        check_ledgers(config, folder.path)
        snapshot = last_snapshot(config, folder)
        told = for_nodes(config, overrides or [], composed)
        prepared = prepare(config, snapshot, None if told is None else shlex.join(told), device=_device(grid))
        prepared.strategy.origin = folder.identity(prepared.strategy.origin)
        return _run(planned(prepared, grid), grid, folder, early, snapshot)


def _device(grid: Grid) -> str | None:
    """Return where the server computes; None: as configured."""
    return grid.device if isinstance(grid, SimulationGrid) else None


def _run(prepared: Prepared, grid: Grid, folder: RunFolder, early: EarlyLines, snapshot: Snapshot | None = None) -> dict[str, Any]:
    """Run what is left of a federation: all of it without a ``snapshot``."""
    begun, config = time.monotonic(), prepared.config
    validated: dict[int, dict[str, float]] = {}
    records = folder.cut(snapshot.round if snapshot else -1)
    feed = Feed({name: TRACKERS[name] for name in config.trackers}, folder.path)
    with run_log(folder.log, config.log_level, early) as log, told(config, folder.path), progress_of(config) as progress, feed:
        listener = listener_of(prepared, folder, progress, lambda: remember(prepared.strategy), feed, validated)
        if snapshot is not None:
            listener.resume(records, snapshot.carried)
        if config.resume:
            listener.say(f"resumed after round {snapshot.round}" if snapshot else "no checkpoint is there yet: the run begins anew")
        more = (*prepared.adapted.remarks, prepared.scores, *opening_lines(config, prepared.every_plan, prepared.adapted.shapes))
        real = prepared.strategy.connect(grid).real
        if real and config.privacy.unit != "none":
            log.leave_times_out()
        skew = None if real else skew_in(config)
        lines = (*([skew.line()] if skew else []), *more)
        for line in opening_remarks(config, grid, prepared.labels, lines, counts=prepared.strategy.counts):
            listener.say(line)
        feed.begin(records)
        prepared.strategy.listener, prepared.strategy.enough = listener, listener.over
        first = encode_arrays(prepared.initial, config.federation.wire_dtype)
        rounds, timeout = config.federation.num_rounds, config.federation.timeout
        try:
            measure = evaluator(prepared, folder.path, progress.count, validated)
            result = prepared.strategy.start(grid, first, num_rounds=rounds, timeout=timeout, evaluate_fn=measure)
        except RunError:
            listener.stopped(prepared.strategy.unfinished())
            raise
        assert result.arrays is not None
        state = decode_state(result.arrays, prepared.adapted.layouts.down)
        wall_s = time.monotonic() - begun + sum(record.wall_s or 0.0 for record in records)
        summary = finish(prepared, folder, listener, state, wall_s)
        feed.finish(summary)
        progress.finish(summary, folder.path)
    return summary


def last_snapshot(config: Config, folder: RunFolder) -> Snapshot | None:
    """Return the last checkpoint of a run that was ended; None where it had not got that far.

    Raises:
        RunError: there are some, and all are damaged or of another configuration.
    """
    try:
        return load_checkpoint(folder.checkpoints, run=fingerprint(config))
    except FileNotFoundError:
        return None


def evaluator(
    prepared: Prepared, folder: Path | None = None, counter: Counter | None = None, validated: dict[int, dict[str, float]] | None = None
) -> Any:
    """Return Flower's ``evaluate_fn``: the server's test split under the current state, in rounds that are to be evaluated.

    What is made of each item after the last round is kept in ``folder``, unless another may be chosen; ``counter`` is told how far each
    evaluation is. What a run that chooses a round finds on its validation part goes into ``validated``.
    """
    config = prepared.config
    due = evaluated_rounds(config.eval.every, config.federation.num_rounds)

    def evaluate_fn(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round not in due or not prepared.adapted.spec.has_global_model:
            return None
        adapted = prepared.adapted
        adapted.install(decode_state(arrays, adapted.layouts.down), prepared.strategy.frozen.view())
        with every_core(), counted_by(counter):
            found = samples(config, adapted, server_round)
            if config.eval.select and validated is not None:
                validated[server_round] = figures(samples(config, adapted, server_round, VALIDATION))
        # Before the record: a run that has one of its last round, and is resumed, does not measure it again.
        if folder is not None and server_round == config.federation.num_rounds and not config.eval.select:
            write_predictions(folder, predictions(config, found, server_round))
        return MetricRecord(figures(found))  # type: ignore[arg-type]

    return evaluate_fn
