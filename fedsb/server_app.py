"""The Flower ServerApp: configuration, model, strategy, start, rounds, report. The CLI runs the same :func:`serve`."""

# ruff: noqa: E402 -- the submitted code must come first on the import path before any of it is imported
from __future__ import annotations

from fedsb.runtime.fab import launch_folder, prefer_submitted_code

prefer_submitted_code()

import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from clients import dense_gradients, draw_evidence, give_evidence
from fedsb.adapters.export import export_head, export_peft
from fedsb.adapters.starts import DATA_FREE, core, sign_start
from fedsb.assembly import (
    anchored,
    corpus_of,
    cut_texts,
    every_core,
    model_of,
    parts_of,
    public_features,
    run_folder,
    task_of,
    test_features,
    use_threads,
)
from fedsb.config import as_yaml, load, split_overrides
from fedsb.errors import RunError, UserError
from fedsb.evaluation import evaluate
from fedsb.frozen import FrozenLog
from fedsb.loading import locate
from fedsb.logs import run_log
from fedsb.messages import decode_arrays, encode_arrays
from fedsb.models import AdaptedModel
from fedsb.pooling import pooling_remark
from fedsb.privacy.models import refuse_mixing_layers
from fedsb.privacy.plan import Plan, ServerPlan
from fedsb.private_run import client_plans, open_accounts, opening_lines, server_plan_of
from fedsb.recorder import Recorder
from fedsb.report.progress import Progress
from fedsb.report.records import RunFolder
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
from strategies.client_privacy import check_sum, client_privacy
from strategies.gradient_start import GradientStart
from strategies.server_optimizer import server_optimizer

LOG = logging.getLogger(__name__)
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run configuration describes; the run fails where the federation does."""
    try:
        config = anchored(load(split_overrides(str(context.run_config["overrides"]))), launch_folder())
        serve(config, grid, run_folder(config, str(context.run_id)))
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
    plans: Mapping[str, Plan] = field(default_factory=dict)
    server_plan: ServerPlan | None = None

    @property
    def every_plan(self) -> list[Plan | ServerPlan]:
        """The clients' plans, or the server's."""
        return list(self.plans.values()) if self.server_plan is None else [self.server_plan]


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
    prepared = planned(prepare(config), grid)
    folder = RunFolder(output)
    folder.write_config(as_yaml(config))
    with run_log(folder.log), Progress(config.federation.num_rounds) as progress:
        listener = recorder(prepared, folder, progress)
        told = opening_lines(config, prepared.every_plan, prepared.adapted.shapes)
        for line in filter(None, (cut_texts(config), pooling_remark(config.model.pooling, "this run"), *told)):
            progress.say(line)
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
    return _finish(prepared, folder, listener, state, time.monotonic() - begun)


def prepare(config: Config) -> Prepared:
    """Load data and model, check that they fit, and build the strategy; writes nothing.

    Raises:
        UserError: they do not fit.
    """
    if config.privacy.unit == "client":
        check_sum(f"method={config.method.name}", STRATEGIES[config.method.name].sums_uploads)
    corpus = corpus_of(config)
    parts_of(config)
    test_features(config)  # before the weights, which may take long
    adapted = model_of(config, corpus.labels)
    server_plan = server_plan_of(config) if config.privacy.unit == "client" else None
    if config.privacy.unit == "example":
        refuse_mixing_layers(adapted.model)
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
            private=config.privacy.unit != "none",
            client_privacy=client_privacy(config.privacy, server_plan, seed=config.seed),
        ),
        server_optimizer=server_optimizer(o.name, lr=o.lr, momentum=o.momentum, betas=o.betas, eps=o.eps),
        wire_dtype=federation.wire_dtype,
        # Measured from the uploads as they are, it is no function of their noised sum.
        exactness=federation.exactness and server_plan is None,
        start=start,
    )
    return Prepared(config, corpus.labels, adapted, strategy, initial, server_plan=server_plan)


def planned(prepared: Prepared, grid: Grid) -> Prepared:
    """Add the clients' plans under ``privacy.unit=example``, once they have said how many examples they have; writes nothing."""
    if prepared.config.privacy.unit != "example":
        return prepared
    return replace(prepared, plans=client_plans(prepared.config, prepared.strategy.connect(grid).num_examples))


def recorder(prepared: Prepared, folder: RunFolder, progress: Progress) -> Recorder:
    """Return the listener of a run; under client-level privacy the server's ledger is charged before each release."""
    claim, books = open_accounts(prepared.config, folder.path, prepared.plans, prepared.server_plan)
    if books is not None and prepared.strategy.participation.client_privacy is not None:
        prepared.strategy.participation.client_privacy.charge = books.charge
    accounts = books.accounts if books else None
    return Recorder(folder, progress, claim, simulated=lambda: prepared.strategy.simulated, server_accounts=accounts)


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
    if kind is None:
        return base, None
    if kind == "gradient" and init.evidence == "clients":
        sketch, noised = sketch_of(init, rank, config.seed), bool(config.privacy.init_fraction)
        return base, GradientStart(sketch, adapted.shapes, core_kind=init.core, step=init.step, noised=noised)
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


def _finish(prepared: Prepared, folder: RunFolder, listener: Recorder, state: State, wall_s: float) -> dict[str, Any]:
    """Export the adapter, write summary and report, print the table."""
    config, adapted, strategy = prepared.config, prepared.adapted, prepared.strategy
    adapted.install(state, strategy.frozen.view())
    _export(prepared, folder, state.pick(HEAD))
    summary = build_summary(
        method=config.method.name,
        rounds=config.federation.num_rounds,
        clients=config.federation.num_clients,
        seed=config.seed,
        model=config.model.name,
        data=config.data.path or config.data.test_path or config.data.kind,
        rank=config.adapter.rank if adapted.spec.factors else None,
        trained_params=adapted.layout.numel,
        records=listener.records,
        factors_sha256=sha256(state, *strategy.frozen.deltas()),
        wall_s=wall_s,
        epsilon=listener.claim.final(simulated=strategy.simulated),
        epsilon_reason=listener.claim.why_none(),
    )
    folder.write_summary(summary)
    write_report(folder.path)
    print_summary(summary, folder.path)
    return summary


def _export(prepared: Prepared, folder: RunFolder, head: State) -> None:
    """Write what was trained for others to load: an adapter in PEFT's format, or the head alone where there is no adapter."""
    config, adapted = prepared.config, prepared.adapted
    if not adapted.spec.factors:
        export_head(head, folder.head)
        return
    base = config.model.name if config.model.kind == "config" else locate(config.model)
    export_peft(adapted.model, folder.adapter, base_model=base, task_type=task_of(config).peft_type, head=head)
