"""The Flower ServerApp: configuration, model, strategy, start, rounds, report. The CLI runs the same :func:`serve`."""

# ruff: noqa: E402 -- the submitted code must come first on the import path before any of it is imported
from __future__ import annotations

from fedsb.runtime.fab import launch_folder, prefer_submitted_code

prefer_submitted_code()

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from clients import dense_gradients, draw_evidence, give_evidence
from fedsb.adapters.export import export_peft
from fedsb.adapters.starts import DATA_FREE, core, sign_start
from fedsb.assembly import anchored, corpus_of, every_core, home, model_of, parts_of, public_features, task_of, test_features, use_threads
from fedsb.checkpoint import save_checkpoint
from fedsb.config import as_yaml, load, split_overrides
from fedsb.errors import RunError, UserError
from fedsb.evaluation import evaluate
from fedsb.frozen import FrozenLog
from fedsb.loading import locate
from fedsb.logs import run_log
from fedsb.messages import decode_arrays, encode_arrays
from fedsb.models import AdaptedModel
from fedsb.report.progress import Progress
from fedsb.report.records import RoundRecord, RunFolder
from fedsb.report.report import write_report
from fedsb.report.summary import build_summary
from fedsb.report.table import print_summary
from fedsb.rules import client_names, start_kind
from fedsb.schema import Config
from fedsb.sketching import sketch_of
from fedsb.state import HEAD, State, sha256, unpack
from fedsb.training import collate
from strategies import STRATEGIES, LowRankStrategy, Participation
from strategies.base import Start
from strategies.gradient_start import GradientStart
from strategies.server_optimizer import server_optimizer

LOG = logging.getLogger(__name__)
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run configuration describes; the run fails where the federation does."""
    try:
        config = anchored(load(split_overrides(str(context.run_config["overrides"]))), launch_folder())
        output = config.output or str(home() / "runs" / str(context.run_id))
        serve(config, grid, Path(output))
    except (UserError, RunError) as error:
        # Flower logs what it is raised with its traceback; a user's mistake is one line.
        print(f"error: {error}", flush=True)
        sys.tracebacklimit = 0
        raise


@dataclass(frozen=True)
class Prepared:
    """What is known, and checked, before anything is written."""

    config: Config
    labels: tuple[str, ...]
    adapted: AdaptedModel
    strategy: LowRankStrategy
    initial: State


def serve(config: Config, grid: Grid, output: Path) -> dict[str, Any]:
    """Run a federation over any grid and leave its outputs in a folder.

    Args:
        config: the whole configuration.
        grid: Flower's, or one of :mod:`fedsb.runtime`.
        output: folder of the run.

    Returns:
        The summary.

    Raises:
        UserError: the configuration does not fit the data or the model, or the folder holds another run.
        RunError: too few clients answered.
    """
    begun = time.monotonic()
    use_threads(config)
    prepared = prepare(config)
    folder = RunFolder(output)
    folder.write_config(as_yaml(config))
    with run_log(folder.log), Progress(config.federation.num_rounds) as progress:
        listener = Recorder(folder, progress)
        if cut := cut_texts(config):
            progress.say(cut)
        prepared.strategy.listener = listener
        try:
            result = prepared.strategy.start(
                grid,
                encode_arrays(prepared.initial, config.federation.wire_dtype),
                num_rounds=config.federation.num_rounds,
                timeout=config.federation.timeout,
                evaluate_fn=evaluator(prepared),
            )
        except RunError:
            listener.stopped(prepared.strategy.unfinished())
            raise
    assert result.arrays is not None
    state = unpack(decode_arrays(result.arrays), prepared.adapted.layout)
    return _finish(prepared, folder, listener.records, state, time.monotonic() - begun)


def cut_texts(config: Config) -> str:
    """Say how many of the test texts the model does not read to their end; nothing where it is next to none."""
    most = config.train.max_length
    lengths = [len(feature["input_ids"]) for feature in test_features(config)]
    share = sum(length >= most for length in lengths) / max(1, len(lengths))
    return f"{share:.0%} of the test texts fill train.max_length={most} tokens; what lies beyond is not read" if share > 0.01 else ""


def prepare(config: Config) -> Prepared:
    """Load data and model, check that they fit, and build the strategy; writes nothing.

    Raises:
        UserError: they do not fit.
    """
    corpus = corpus_of(config)
    parts_of(config)
    test_features(config)  # before the weights, which may take long
    adapted = model_of(config, corpus.labels)
    frozen = FrozenLog()
    initial, start = _start(config, adapted, frozen)
    federation = config.federation
    o = federation.server_optimizer
    strategy = build_strategy(
        config,
        spec=adapted.spec,
        layout=adapted.layout,
        scale=adapted.scale,
        labels=corpus.labels,
        frozen=frozen,
        participation=Participation(
            clients=client_names(config),
            fraction=federation.fraction,
            weighting=federation.weighting,
            min_replies=federation.min_replies,
            wait=federation.wait,
            evaluate=federation.evaluate_clients,
            seed=config.seed,
        ),
        server_optimizer=server_optimizer(o.name, lr=o.lr, momentum=o.momentum, betas=o.betas, eps=o.eps),
        wire_dtype=federation.wire_dtype,
        exactness=federation.exactness,
        start=start,
    )
    return Prepared(config, corpus.labels, adapted, strategy, initial)


def build_strategy(config: Config, **parts: Any) -> LowRankStrategy:
    """Build the strategy of a method.

    Raises:
        UserError: an option that the method does not have.
    """
    try:
        return STRATEGIES[config.method.name](**config.method.options, **parts)
    except TypeError as error:
        given = ", ".join(config.method.options) or "none"
        raise UserError(f"method '{config.method.name}' does not take these method.options ({given}): {error}") from None


def _start(config: Config, adapted: AdaptedModel, frozen: FrozenLog) -> tuple[State, Start | None]:
    """Return the first trained state and what is left to do with the clients; a basis known already goes to the log."""
    adapted.reset()
    base, kind, init, rank = adapted.trained(), start_kind(config), config.init, config.adapter.rank
    if kind == "gradient" and init.evidence == "clients":
        return base, GradientStart(sketch_of(init, rank, config.seed), adapted.shapes, core_kind=init.core, step=init.step)
    if kind == "gradient":
        found = public_start(config, adapted)
        factors = found.pick("A", "B").merge(core(found, init.core, step=init.step, scale=adapted.scale))
    else:
        factors = DATA_FREE[config.method.adapter, kind](adapted.weights(), rank, config.seed)
    frozen.append(factors.pick(*adapted.spec.frozen))
    return base.merge(factors.pick(*adapted.spec.trained)), None


def public_start(config: Config, adapted: AdaptedModel) -> State:
    """Return B, A and the singular values of the gradient on the server's public text: the same sketch, with one party."""
    task, init = task_of(config), config.init
    examples = draw_evidence(public_features(config), init.num_examples, seed=config.seed, client="public")
    if init.update == "sign":
        chunks = [examples[i : i + init.micro_batch] for i in range(0, len(examples), init.micro_batch)]
        batches = [(batch, task.terms(batch)) for batch in (collate(chunk, adapted, task) for chunk in chunks)]
        gradients = dense_gradients(adapted.model, batches, lambda model, batch: task.loss(task.forward(model, batch), batch))
        return sign_start(gradients, config.adapter.rank, config.seed)
    sketch = sketch_of(init, config.adapter.rank, config.seed)
    probes = mean = State()
    for number, stage in enumerate(sketch.exchanges):
        probes = sketch.basis(mean) if number else State()
        mean = give_evidence(adapted, task, examples, sketch=sketch, stage=stage, probes=probes, micro_batch=init.micro_batch)
    return sketch.finish(mean, probes)


def evaluator(prepared: Prepared) -> Any:
    """Return Flower's ``evaluate_fn``: the server's test split under the current state."""
    task, features = task_of(prepared.config), test_features(prepared.config)

    def evaluate_fn(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        adapted = prepared.adapted
        adapted.install(unpack(decode_arrays(arrays), adapted.layout), prepared.strategy.frozen.view())
        with every_core():
            return MetricRecord(evaluate(adapted, task, features, train=prepared.config.train))  # type: ignore[arg-type]

    return evaluate_fn


class Recorder:
    """Writes each round to the run's folder and shows it."""

    def __init__(self, folder: RunFolder, progress: Progress) -> None:
        self.records: list[RoundRecord] = []
        self._folder = folder
        self._progress = progress

    def begin(self, round_number: int, clients: Sequence[str], stage: str) -> None:
        """Show that an exchange begins; those of the start have a line each, since their round's line comes late."""
        if stage:
            self._progress.say(f"{stage}, {len(clients)} clients")
        self._progress.begin(round_number, clients)

    def reply(self, client: str, ok: bool) -> None:
        """Show a reply."""
        self._progress.reply(client, ok)

    def stopped(self, record: RoundRecord | None) -> None:
        """Append the record of a round that stopped the run: its failures count like any other's."""
        if record is not None:
            self._folder.append(record)

    def end(self, record: RoundRecord, state: State, frozen: FrozenLog) -> None:
        """Append the record, save a checkpoint, print the round's line."""
        self.records.append(record)
        self._folder.append(record)
        save_checkpoint(self._folder.checkpoints, record.round, state, frozen)
        self._progress.end(record)


def _finish(prepared: Prepared, folder: RunFolder, records: Sequence[RoundRecord], state: State, wall_s: float) -> dict[str, Any]:
    """Export the adapter, write summary and report, print the table."""
    config, adapted, strategy = prepared.config, prepared.adapted, prepared.strategy
    adapted.install(state, strategy.frozen.view())
    base = config.model.name if config.model.kind == "config" else locate(config.model)
    export_peft(adapted.model, folder.adapter, base_model=base, task_type=task_of(config).peft_type, head=state.pick(HEAD))
    summary = build_summary(
        method=config.method.name,
        rounds=config.federation.num_rounds,
        clients=config.federation.num_clients,
        seed=config.seed,
        model=config.model.name,
        data=config.data.path or config.data.test_path or config.data.kind,
        rank=config.adapter.rank,
        trained_params=adapted.layout.numel,
        records=records,
        factors_sha256=sha256(state, *strategy.frozen.deltas()),
        wall_s=wall_s,
    )
    folder.write_summary(summary)
    write_report(folder.path)
    print_summary(summary, folder.path)
    return summary
