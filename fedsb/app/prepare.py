"""What a run needs before anything is written: data, model, strategy and plans, each held against the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from typing import Any

from flwr.serverapp import Grid

from fedsb.adapters.held import HeldWeights
from fedsb.app.assembly import corpus_of, model_of, parts_of, task_of, tokenizer_of
from fedsb.app.client_data import counts_dealt
from fedsb.app.first_factors import first_factors
from fedsb.app.measuring.scoring import check_scores, check_selection
from fedsb.app.own_factors import made_again, made_factors
from fedsb.app.private_run import client_plans, server_plan_of
from fedsb.app.secured_terms import bound_of
from fedsb.config.derived import client_names, family, ranks_of
from fedsb.config.schema import Config
from fedsb.config.settings import POOLED
from fedsb.core.cohort import evaluated_rounds
from fedsb.core.errors import UserError, check_options
from fedsb.core.logs import say_early
from fedsb.core.state import State
from fedsb.models.abilities import check_abilities
from fedsb.models.adapted import AdaptedModel
from fedsb.models.packing import check_packing
from fedsb.privacy.models import refuse_mixing_layers
from fedsb.privacy.plan import Plan, ServerPlan
from fedsb.run.checkpoint import Snapshot
from fedsb.run.resuming import PATHS, fingerprint
from fedsb.runtime.grid import SimulationGrid
from fedsb.runtime.stack_size import check_stack
from fedsb.wire.frozen import FrozenLog
from strategies import STRATEGIES, LowRankStrategy, Participation
from strategies.carried import recall
from strategies.combinations import Wanted, check_wanted
from strategies.keys import keys_folder
from strategies.privacy.client_unit import client_unit
from strategies.secure_sum import SecureSum
from strategies.server_optimizer import server_optimizer


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
    scores: str = ""  # what is said of them before the first round

    @property
    def every_plan(self) -> list[Plan | ServerPlan]:
        """The clients' plans, or the server's."""
        return list(self.plans.values()) if self.server_plan is None else [self.server_plan]


def prepare(config: Config, snapshot: Snapshot | None = None, told: str | None = None, *, device: str | None = None) -> Prepared:
    """Load data and model, check that they fit, and build the strategy, to go on after ``snapshot``; writes nothing.

    Args:
        config: the whole configuration.
        snapshot: what to go on after.
        told: the overrides that real nodes must be told; None where they see them, or nobody knows them.
        device: where the server computes; None: as configured.

    Raises:
        UserError: they do not fit.
    """
    check_method(config)
    corpus = corpus_of(config)
    parts_of(config)
    tokenizer_of(config)  # before the weights, which may take long
    adapted = model_of(config, corpus.labels, device)
    check_abilities(config.train, adapted)
    if config.train.packing:
        check_packing(adapted, task_of(config))
    scores = check_scores(config, adapted)
    check_selection(config, adapted)
    server_plan = server_plan_of(config) if config.privacy.unit == "client" else None
    if config.privacy.unit == "example":
        refuse_mixing_layers(adapted.model)
    frozen = FrozenLog()
    initial, start = first_factors(config, adapted, frozen)
    federation = config.federation
    o = federation.server_optimizer
    strategy = build_strategy(
        config,
        spec=adapted.spec,
        layouts=adapted.layouts,
        scale=adapted.scale,
        labels=corpus.labels,
        frozen=frozen,
        participation=Participation(
            clients=client_names(config),
            fraction=federation.fraction,
            weighting=federation.weighting,
            cutoff=federation.cutoff,
            min_replies=federation.min_replies,
            wait=federation.wait,
            replace_nodes=federation.replace_nodes,
            node_keys=keys_folder(federation.node_keys),
            overrides=told,
            resumed=config.resume is not None,
            say=partial(say_early, progress=config.progress),
            dealt=partial(counts_dealt, config, corpus.labels) if len(corpus.train) else None,
            ranks=ranks_of(config),
            rank=config.adapter.rank if adapted.spec.factors else None,
            several_ranks=STRATEGIES[config.method.name].any_rank,
            begin_anew=federation.lost_state == "anew",
            evaluate=federation.evaluate_clients,
            evaluated=evaluated_rounds(config.eval.every, federation.num_rounds),
            seed=config.seed,
            private=config.privacy.unit != "none",
            pooled=config.method.setting == POOLED,
            client_unit=client_unit(config.privacy, server_plan, seed=config.seed),
        ),
        server_optimizer=server_optimizer(o.name, lr=o.lr, momentum=o.momentum, betas=o.betas, eps=o.eps),
        wire_dtype=federation.wire_dtype,
        error_feedback=federation.error_feedback,
        # Measured from the uploads as they are, it is no function of their noised sum.
        exactness=federation.exactness and server_plan is None,
        held_weights=HeldWeights(adapted.frozen_parts(), config.seed),
        start=start,
        secure=secure_sum(config),
    )
    if snapshot is not None:
        initial = snapshot.state
        recall(strategy, snapshot)
    strategy.frozen.bring(made_again(config, adapted, snapshot) if snapshot else made_factors(config, adapted).factors)
    strategy.frozen.as_factors = adapted.held_as_factors
    return Prepared(config, corpus.labels, adapted, strategy, initial, server_plan=server_plan, scores=scores)


def check_method(config: Config) -> None:
    """Hold what a configuration asks for against its method, before anything is read.

    Raises:
        UserError: it does not go with the method.
    """
    federation, method = config.federation, STRATEGIES[config.method.name]
    check_options("method.options", f"method '{config.method.name}'", config.method.options, options_of(method))
    optimizer, ranks = federation.server_optimizer.name != "none", federation.ranks or ()
    wanted = Wanted(config.privacy.unit == "client", ranks, optimizer, federation.weighting, federation.secure_sum)
    check_wanted(method, family(config), wanted, f"method={config.method.name}")


def secure_sum(config: Config) -> SecureSum | None:
    """Return how the uploads of a run are summed where the server is to see none."""
    if not config.federation.secure_sum:
        return None
    return SecureSum(config.federation.secure_dropout, partial(bound_of, config), fingerprint(config, without=PATHS))


def options_of(method: type[LowRankStrategy]) -> set[str]:
    """Return the names of what may be chosen of a method: the arguments that it takes beside those that every method takes."""
    own = method.__mro__[: method.__mro__.index(LowRankStrategy)]
    named = {p.name for each in own for p in signature(each).parameters.values() if p.kind is p.KEYWORD_ONLY}
    return named - {*signature(LowRankStrategy).parameters}


def planned(prepared: Prepared, grid: Grid) -> Prepared:
    """Add the clients' plans under ``privacy.unit=example``, once they have said how many examples they have; writes nothing."""
    if isinstance(grid, SimulationGrid):
        check_stack(prepared.config, prepared.adapted, task_of(prepared.config), grid.seat)
    if prepared.config.privacy.unit != "example":
        return prepared
    return replace(prepared, plans=client_plans(prepared.config, prepared.strategy.connect(grid).num_examples))


def shapes_alone(config: Config, adapted: AdaptedModel) -> LowRankStrategy:
    """Return the strategy of a configuration that is asked what would travel, and never run."""
    check_method(config)
    federation = config.federation
    return build_strategy(
        config,
        spec=adapted.spec,
        layouts=adapted.layouts,
        scale=adapted.scale,
        participation=Participation(clients=client_names(config), fraction=federation.fraction, ranks=ranks_of(config)),
        wire_dtype=federation.wire_dtype,
        error_feedback=federation.error_feedback,
    )


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
