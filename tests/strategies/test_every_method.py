"""What every method must do, read off the dictionary of methods: whoever adds one adds it here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from itertools import pairwise
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fedsb.adapters import SPECS
from fedsb.adapters.spec import NEVER
from fedsb.app.client_job import Job
from fedsb.app.own_factors import data_free, fresh_factors
from fedsb.app.prepare import options_of
from fedsb.config.compose import load
from fedsb.core.errors import RunError, UserError
from fedsb.core.state import HEAD, Name, State, sha256
from fedsb.cost.table import cost_of
from fedsb.run.own_state import OwnState
from strategies import STRATEGIES
from tests.strategies.federations import FEDERATED_METHODS, Federation, classification, federate, start_of
from tests.strategies.private_runs import CLIENT, EXAMPLE, Finished, run_privately, small
from tests.strategies.rounds import METHODS as WITH_FACTORS
from tests.strategies.rounds import undrawn

SCHEDULE = [
    "federation.num_rounds=4",
    "federation.fraction=0.6",
    "adapter.alpha=5",
    "train.lr=0.02",
    "federation.partition.sizes=[9,8,7,6,5]",
]
METHODS = FEDERATED_METHODS
Run = Callable[..., Federation]


@pytest.fixture(scope="module")
def run(tiny_bert: Path, tiny_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a federation of five clients of unequal size, three a round, once for each method and set of overrides."""

    @cache
    def federated(method: str, *more: str) -> Federation:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FEDSB_HOME", str(tmp_path_factory.mktemp("home")))
            return federate([*classification(tiny_bert, tiny_csv), f"method={method}", start_of(method), *SCHEDULE, *more])

    return federated


@pytest.mark.parametrize("method", METHODS)
def test_a_run_moves_what_its_cost_foretells(run: Run, method: str) -> None:
    federation = run(method)
    cost = cost_of(federation.config)
    assert undrawn(federation) == (cost.payload_up, cost.payload_down, cost.payload_one_off)


def test_the_files_of_methods_name_all_their_options() -> None:
    for name, method in STRATEGIES.items():
        assert {*load([f"method={name}"]).method.options} == options_of(method)


@pytest.mark.parametrize("method", METHODS)
def test_the_gap_is_nothing_where_a_method_is_exact_and_something_elsewhere(run: Run, method: str) -> None:
    federation = run(method)
    gaps = [record.exactness_gap for record in federation.records[1:]]
    whole = federation.prepared.strategy.has_global_model
    assert {record.measured_by for record in federation.records[1:]} == {"server" if whole else "clients"}
    if not whole:
        assert gaps == [None] * 4
    elif federation.prepared.strategy.is_exact:
        assert max(gaps) < 1e-5
    else:
        assert min(gaps) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_every_factor_that_learns_moves(run: Run, method: str) -> None:
    """The last state and the log together hold what the server keeps, and all of it that learns has left its start."""
    federation = run(method)
    spec, last = federation.prepared.adapted.spec, federation.kept.states[-1].merge(federation.frozen.view().basis)
    start = data_free(federation.config, federation.prepared.adapted) if spec.starts else State()
    first = start.merge(federation.kept.states[0])
    kept = [role.name for role in (*spec.roles, spec.head) if role.kept_by == "server"]
    assert {name.role for name in last} == {*kept}
    moved = {name.role for name, t in last.items() if not torch.equal(t, first[name])}
    learnt = {role.name for role in (*spec.roles, spec.head) if role.kept_by == "server" and role.learns != NEVER}
    if federation.prepared.strategy.is_the_mean():
        assert moved == learnt
    else:  # a rule may move what rests at clients, or W0 and not the factors
        added = federation.frozen.view().residuals
        assert learnt <= moved or (added and moved == {HEAD})


@pytest.mark.parametrize("method", METHODS)
def test_a_round_tells_the_gauge_of_what_clients_hold(run: Run, method: str) -> None:
    """‖B‖ / ‖A‖, over all factors that are called so and all modules, where the server has both."""
    federation = run(method)
    for record, basis, state in zip(federation.records[1:], federation.kept.bases[1:], federation.kept.states[1:], strict=True):
        held = [(name.role[0], float(t.double().square().sum())) for name, t in basis.merge(state).items() if name.role != HEAD]
        out, into = (sum(square for side, square in held if side == letter) for letter in "BA")
        wanted = (out / into) ** 0.5 if out and into else None
        assert record.extras.get("gauge") == (wanted and pytest.approx(wanted, rel=1e-6))


@pytest.mark.parametrize("method", METHODS)
def test_after_the_last_round_everyone_measures_what_nobody_else_holds(run: Run, method: str) -> None:
    federation = run(method)
    rounds = federation.grid.rounds()
    assert len(rounds[4]) == 3
    if not federation.prepared.strategy.has_global_model:
        assert [len(record.client_metrics) for record in federation.records[1:]] == [3, 3, 3, 5]


@pytest.mark.parametrize("method", METHODS)
def test_clients_of_several_ranks_move_true_shapes_or_are_refused(run: Run, method: str) -> None:
    if not STRATEGIES[method].any_rank:
        with pytest.raises(
            UserError,
            match=r"federation\.ranks=\[1, 2, 3\]: (method=\w+ averages factors of one shape|the whole product is taken out of W0).*; use",
        ):
            run(method, "federation.ranks=[1,2,3]")
        return
    federation = run(method, "federation.ranks=[1,2,3]")
    cost = cost_of(federation.config)
    assert undrawn(federation) == (cost.payload_up, cost.payload_down, cost.payload_one_off)
    assert federation.payload()[0] < run(method).payload()[0]
    adapted, head = federation.prepared.adapted, federation.prepared.initial.pick(HEAD).numel

    def values(roles: tuple[str, ...], *ranks: int) -> int:
        shapes = [adapted.spec.shapes(m, n, rank) for m, n in adapted.shapes.values() for rank in ranks]
        return sum(prod(each[role]) for each in shapes for role in roles)

    assert cost.up == values(adapted.spec.uploaded(1), 1, 2, 3, 1, 2) // 5 + head
    assert cost.trained == values(adapted.spec.ever_learn, 1, 2, 3, 1, 2) // 5 + head
    for exchange in federation.grid.exchanges:
        rank = 1 + int(exchange.instruction.client.removeprefix("client-")) % 3
        assert exchange.answer.flats["trained"].numel() == values(adapted.spec.uploaded(exchange.instruction.round), rank)
    assert all(not record.failed for record in federation.records)


@pytest.mark.parametrize("method", METHODS)
def test_clients_evaluate_what_they_hold(run: Run, method: str) -> None:
    federation = run(method, "federation.evaluate_clients=true", "data.client_test_fraction=0.3")
    for record in federation.records[1:]:
        everyone = record.round == 4
        assert set(record.client_metrics) == set(federation.prepared.strategy.participation.clients if everyone else record.clients)
        assert not record.failed
        assert all(0 <= row["accuracy"] <= 1 for row in record.client_metrics.values())
    rare = run(method, "federation.evaluate_clients=true", "data.client_test_fraction=0.3", "eval.every=2")
    for each in (federation, rare):
        cost = cost_of(each.config)
        assert undrawn(each) == (cost.payload_up, cost.payload_down, cost.payload_one_off)
    assert rare.payload()[1] < federation.payload()[1] or not federation.prepared.adapted.spec.uploads


def assert_rests(run: Finished) -> None:
    """Hold that noise falls on what learns alone: nothing that rests is uploaded, and what the log has of it is the start's."""
    spec, layouts, log = run.prepared.adapted.spec, run.prepared.adapted.layouts, run.prepared.strategy.frozen
    roles = {name.role for turn in layouts.up for name, _ in turn.shapes}
    assert roles == {HEAD, *(("Y",) if spec.sketch else (role.name for role in spec.roles if role.up and role.learns != NEVER))}
    assert not {name.role for version, delta in log.deltas().items() if version > 1 for name in delta} & {*spec.frozen}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("unit", [EXAMPLE, CLIENT], ids=["example", "client"])
def test_privacy_is_accounted_for_or_refused_in_one_line(
    unit: tuple[str, ...], method: str, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    overrides = small(tiny_bert, tmp_path, *unit, f"method={method}", start_of(method, "weight_svd"))
    chosen = load([f"method={method}"]).method
    whole, needed = not SPECS[chosen.adapter].own, "privacy.unit!=example" in chosen.needs
    if whole and not (needed and unit is EXAMPLE) and (unit is EXAMPLE or STRATEGIES[method].needs_a_mean_alone()):
        run = run_privately(overrides, tmp_path / "run")
        assert run.error is None
        assert run.claim.final(simulated=True)["max"] > 0
        assert_rests(run)
    else:
        with pytest.raises(UserError, match=r"^privacy\.unit=\w+:? [^\n]+; (use|leave) [^\n]+$"):
            run_privately(overrides, tmp_path / "run")


@pytest.mark.parametrize("method", METHODS)
def test_what_rests_in_a_round_is_the_same_after_it(run: Run, method: str) -> None:
    """To the bit, whoever was absent; a rule that makes more of the uploads than their mean may move it, as FedSVD does."""
    federation = run(method)
    spec, kept = federation.prepared.adapted.spec, federation.kept
    held = [basis.merge(state) for basis, state in zip(kept.bases, kept.states, strict=True)]
    for number, (before, after) in enumerate(pairwise(held), start=1):
        moved = {name.role for name, t in after.items() if not torch.equal(t, before[name])}
        learnt = {*spec.uploaded(number), *({HEAD} - {*spec.own})}
        if federation.prepared.strategy.is_the_mean():
            assert moved == learnt
        else:
            adds = federation.prepared.strategy.adds_to_weights()
            assert learnt - {*spec.fresh} <= moved or (adds and moved == {HEAD})


@pytest.mark.parametrize("method", METHODS)
def test_what_nobody_keeps_begins_in_each_round_anew_and_alike_for_all(run: Run, method: str) -> None:
    federation = run(method)
    spec, config = federation.prepared.adapted.spec, federation.config
    models = federation.prepared.adapted, federation.fresh_model(), federation.fresh_model()
    first, again, second = (fresh_factors(config, model, number) for model, number in zip(models, (1, 1, 2), strict=True))
    assert {name.role for name in first} == {*spec.fresh}
    assert sha256(first) == sha256(again)
    drawn = {name for name, t in first.items() if t.any()}
    assert bool(drawn) == bool(spec.fresh)
    assert not any(torch.equal(first[name], second[name]) for name in drawn)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_tells_all_that_is_ever_trained(run: Run, method: str) -> None:
    adapted = run(method).prepared.adapted
    shapes = [adapted.spec.shapes(m, n, 3) for m, n in adapted.shapes.values()]
    factors = sum(prod(each[role]) for each in shapes for role in adapted.spec.ever_learn)
    assert adapted.layouts.learnt.numel == factors + sum(p.numel() for name, p in adapted.model.named_parameters() if name in adapted.head)


BESIDE = ("federation.server_optimizer.name=momentum", "federation.server_optimizer.name=adam", "federation.weighting=fedau")


def goes_with(method: str, beside: str) -> bool:
    rule, spec = STRATEGIES[method], SPECS[load([f"method={method}"]).method.adapter]
    return rule.is_the_mean() and bool(spec.uploads) and ("optimizer" not in beside or spec.turns == 1)


# Where it acts, one of them a method, in turn: all three act on the same mean.
ACTING = [[(name, beside) for beside in BESIDE if goes_with(name, beside)] for name in METHODS]
TURNS = [cases[number % len(cases)] for number, cases in enumerate(ACTING) if cases]
REFUSED = [(name, beside) for name in METHODS for beside in BESIDE if not goes_with(name, beside)]


@pytest.mark.parametrize(("method", "beside"), [*TURNS, *REFUSED])
def test_what_acts_on_a_mean_acts_on_it_or_is_refused_in_one_line(run: Run, method: str, beside: str) -> None:
    """And where it acts the uploads are as exact a mean as without it."""
    if not goes_with(method, beside):
        with pytest.raises(UserError, match=r"^federation\.\w+(=fedau)? [^\n]+; use [^\n]+$"):
            run(method, beside)
        return
    federation = run(method, beside, "federation.server_optimizer.lr=0.1")
    assert not any(record.failed for record in federation.records)
    assert federation.sha256 != run(method).sha256
    if federation.prepared.strategy.has_global_model and federation.prepared.strategy.is_exact:
        assert max(record.exactness_gap for record in federation.records[1:]) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_only_who_keeps_something_is_told_which_of_its_rounds_counted(run: Run, method: str) -> None:
    federation = run(method)
    counted: dict[str, int] = {}
    for number, exchanges in federation.grid.rounds().items():
        told = {exchange.instruction.client: exchange.instruction.own for exchange in exchanges}
        assert told == {client: counted.get(client, 0) for client in told}
        counted |= dict.fromkeys(federation.records[number].clients if federation.prepared.adapted.spec.own else (), number)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in WITH_FACTORS])
def test_an_equal_seed_gives_equal_bits(run: Run, method: str) -> None:
    """Those with factors are held to it by nodes whose replies come shuffled, in test_rounds_bits."""
    assert run(method, "progress=lines").sha256 == run(method).sha256


def test_a_client_that_diverged_sends_nothing_and_keeps_what_it_had(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    own = [method for method in METHODS if SPECS[load([f"method={method}"]).method.adapter].own]
    assert own
    for method in own:
        config = load([f"method={method}"])
        kept = OwnState(tmp_path / method, 3)
        job = SimpleNamespace(
            adapted=SimpleNamespace(spec=SPECS[config.method.adapter]), instruction=SimpleNamespace(round=2, own=1), _own_state=kept
        )
        role = SPECS[config.method.adapter].own[0]
        for value, held in ((1.0, 1.0), (float("nan"), 1.0), (3.0, 3.0)):
            refused = pytest.raises(
                RunError, match=rf"^{role} of 'x', which the client keeps for itself, holds NaN or infinity; lower train"
            )
            with refused if held != value else nullcontext():
                Job.keep_own(job, State({Name("x", role): torch.full((2, 2), value)}))  # type: ignore[arg-type]
            assert float(kept.of(2)[Name("x", role)].sum()) == 4 * held
