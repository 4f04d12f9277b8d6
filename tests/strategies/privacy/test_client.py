"""Laws of whole runs under privacy.unit=client: a slow oracle of what is released, the server's ledger, what stays in the simulation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message

from fedsb.client_app import app as client_app
from fedsb.core.cohort import draw_cohort
from fedsb.core.errors import UserError
from fedsb.core.rng import torch_generator
from fedsb.core.state import State, squared_norm, subtract
from fedsb.run.checkpoint import load_checkpoint
from fedsb.wire.sketch_layouts import reply_layout, sketch_of
from tests.strategies.federations import ClientCall, split_nodes
from tests.strategies.private_runs import CLIENT, Finished, asked, ledger_lines, rdp_epsilon, releases, run_privately, small

START = ("init.kind=gradient", "init.num_examples=10", "init.power_iterations=0")


@pytest.mark.parametrize("method", ["fed_sb", "fedavg_lora", "head_only"])
def test_methods_that_sum_uploads_run(method: str, tiny_bert: Path, tmp_path: Path) -> None:
    run = run_privately(small(tiny_bert, tmp_path, *CLIENT, f"method={method}"), tmp_path / "run")
    assert not any(record.failed for record in run.records)
    epsilon = run.claim.final(simulated=True)
    assert epsilon["max"] == epsilon["min"] == pytest.approx(rdp_epsilon([(2.0, 1.0, 2)]), rel=1e-3)
    assert "protects one client's whole data, against every reader of the model; the server is trusted" in run.printed


REFUSED = {
    "fedex_lora": (
        ["method=fedex_lora"],
        r"^privacy.unit=client is not defined for method=fedex_lora: .* makes more of the uploads than that; use one that",
    ),
    "weights": (["federation.weighting=examples"], r"weight would be protected less; use federation.weighting=uniform$"),
    "per_layer": (["privacy.clipping=per_layer"], r"^privacy.clipping=per_layer is for privacy.unit=example; use flat or adaptive"),
    "delta": (["privacy.delta=0.25"], r"^privacy.delta=0.25 is not below 1/4 for 4 clients; it must be, or leaving it null takes"),
    "count noise": (["privacy.clipping=adaptive", "privacy.count_noise=1"], r"^privacy.count_noise=1.0 must be above half of the noise"),
    "a budget": (["privacy.max_epsilon=3"], r"^privacy.max_epsilon=3.0 is for privacy.unit=example"),
    "normalised sketches": (["privacy.init_normalise=true"], r"^privacy.init_normalise=True is for privacy.unit=example"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_noise_would_not_cover_is_refused_in_one_line(case: str, tiny_bert: Path, tmp_path: Path) -> None:
    overrides, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as refused:
        run_privately(small(tiny_bert, tmp_path, *CLIENT, *overrides), tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_epsilon_follows_the_server_ledger_and_the_drawn_rounds(tiny_bert: Path, tmp_path: Path) -> None:
    """Two of four clients a round: a client pays for its own rounds, each at sampling rate 1."""
    more = ("privacy=client", "privacy.epsilon=8", "federation.weighting=uniform", "federation.fraction=0.5", "federation.num_rounds=4")
    run = run_privately(small(tiny_bert, tmp_path, *more), tmp_path / "run")
    charges = {charge["key"][1]: charge for charge in ledger_lines(run.folder, "server")}
    assert [charge["key"] for charge in charges.values()] == [["simulation", number, "train"] for number in range(1, 5)]
    assert {(e["sampling_rate"], e["steps"]) for charge in charges.values() for e in charge["entries"]} == {(1.0, 1)}
    names = [f"client-{i}" for i in range(4)]
    cohorts = {number: draw_cohort(names, 2, seed=run.config.seed, round_number=number) for number in charges}
    for record in run.records:
        assert record.epsilon is not None
        for client in names:
            drawn = [charge for number, charge in charges.items() if number <= record.round and client in cohorts[number]]
            told = record.epsilon["clients"][client]["epsilon"]
            assert told == pytest.approx(rdp_epsilon(releases(drawn)), rel=2e-3)
    final = run.claim.final(simulated=True)
    assert 0.97 * 8 <= final["max"] <= 8
    assert final["min"] < final["max"]
    assert {record.round: set(record.clients) for record in run.records[1:]} == {n: set(cohort) for n, cohort in cohorts.items()}


def test_a_release_is_charged_before_anyone_is_asked(tiny_bert: Path, tmp_path: Path) -> None:
    held: dict[int, int] = {}

    def app(message: Message, context: Context) -> Message:
        if asked(message)[0]:
            held.setdefault(asked(message)[1], len(ledger_lines(tmp_path / "run", "server")))
        return client_app(message, context)

    run_privately(small(tiny_bert, tmp_path, *CLIENT), tmp_path / "run", app=app)
    assert held == {1: 1, 2: 2}


def failing(client: str, number: int) -> ClientCall:
    """Return the ClientApp with a client that fails in one round."""

    def call(message: Message, context: Context) -> Message:
        if asked(message) == (client, number):
            raise OSError("the disk is full")
        return client_app(message, context)

    return call


def released(run: Finished, number: int, bound: float, multiplier: float, cohort: int) -> State:
    """Return ``current + (Σ clipped updates + noise) / cohort`` in float64, from the messages of a round and the noise's named stream."""
    exchanges = run.grid.rounds()[number]
    layout = run.prepared.adapted.layouts.down
    current = exchanges[0].instruction.state(layout).map(torch.Tensor.double)
    total = current.map(torch.zeros_like)
    for e in exchanges:
        if e.uploaded:
            update = subtract(e.answer.state(layout).map(torch.Tensor.double), current)
            share = min(1.0, bound / math.sqrt(squared_norm(update)))
            total = State({name: t + share * update[name] for name, t in total.items()})
    stream = torch_generator(run.config.seed, "server-noise", f"round-{number}")
    noise = total.map(lambda t: torch.randn(t.shape, generator=stream, dtype=torch.float64))
    return State({name: (t + (total[name] + multiplier * bound * noise[name]) / cohort).float() for name, t in current.items()})


def test_the_released_state_is_that_of_a_slow_oracle(tiny_bert: Path, tmp_path: Path) -> None:
    """Some updates lie above the bound, some below; in round 2 a client fails and the divisor stays."""
    more = ("privacy=client", "privacy.noise_multiplier=0.5", "federation.weighting=uniform", "privacy.max_grad_norm=0.15")
    sizes = ("federation.partition.kind=size", "federation.partition.sizes=[5,3,1,1]", "train.local_steps=null", "train.lr=0.01")
    run = run_privately(small(tiny_bert, tmp_path, *more, *sizes), tmp_path / "run", app=failing("client-1", 2))
    layout = run.prepared.adapted.layouts.down
    assert [set(record.failed) for record in run.records] == [set(), set(), {"client-1"}]
    assert 0 < run.records[1].simulation_only["clip_rate"] < 1
    assert run.records[2].extras["noise_std"] == pytest.approx(0.5 * 0.15 / 4)
    after = {1: run.grid.rounds()[2][0].instruction.state(layout), 2: load_checkpoint(run.folder / "checkpoints").state}
    for number, state in after.items():
        wanted = released(run, number, 0.15, 0.5, cohort=4)
        assert set(wanted) == set(state)
        for name, t in wanted.items():
            torch.testing.assert_close(state[name], t, rtol=0, atol=1e-7)
    assert not torch.equal(*(torch.cat([t.flatten() for t in state.values()]) for state in after.values()))
    epsilon = run.records[2].epsilon
    assert epsilon is not None
    assert epsilon["min"] == epsilon["max"]  # who failed was in the release's cohort all the same


def test_a_bound_that_clips_nobody_and_one_that_clips_everybody(tiny_bert: Path, tmp_path: Path) -> None:
    rates = {}
    for bound in (1e-3, 1e3):
        run = run_privately(small(tiny_bert, tmp_path, *CLIENT, f"privacy.max_grad_norm={bound}"), tmp_path / f"run-{bound}")
        rates[bound] = [record.simulation_only["clip_rate"] for record in run.records[1:]]
    assert rates == {1e-3: [1.0, 1.0], 1e3: [0.0, 0.0]}


def test_figures_without_noise_are_of_the_simulation_only(tiny_bert: Path, tmp_path: Path) -> None:
    run = run_privately(small(tiny_bert, tmp_path, *CLIENT), tmp_path / "run")
    for record in run.records[1:]:
        assert record.train_loss is None
        assert record.exactness_gap is None
        assert record.client_metrics == record.accounts == {}
        assert set(record.simulation_only) == {"train_loss", "clip_rate", "signal_to_noise"}
        assert set(record.extras) == {"clip_norm", "noise_std", "gauge"}  # the last of what clients hold, which is noised


def test_real_nodes_leave_none_of_them_and_get_noise_that_no_seed_repeats(tiny_bert: Path, tmp_path: Path) -> None:
    few = ("federation.num_clients=2", "federation.num_rounds=1")
    overrides = small(tiny_bert, tmp_path, *CLIENT, *few)
    nodes = split_nodes(tmp_path / "data", overrides, 2)
    runs = [run_privately(overrides, tmp_path / name, nodes=nodes) for name in ("one", "two")]
    for run in runs:
        text = (run.folder / "metrics.jsonl").read_text()
        last = json.loads(text.splitlines()[-1])
        assert last["train_loss"] is None
        assert last["simulation_only"] == {}
        assert last["epsilon"]["simulated"] is False
        assert not [word for word in ("clip_rate", "signal_to_noise") if word in text]
    uploads = [[e.answer.flats["trained"] for e in run.grid.exchanges] for run in runs]
    assert all(torch.equal(a, b) for a, b in zip(*uploads, strict=True))
    assert runs[0].sha256 != runs[1].sha256


def test_a_start_with_noise_is_charged_to_every_client(tiny_bert: Path, tmp_path: Path) -> None:
    """Drawn or not: all give a sketch."""
    more = (*START, "privacy=client", "privacy.epsilon=8", "privacy.init_fraction=0.5", "federation.weighting=uniform")
    run = run_privately(small(tiny_bert, tmp_path, *more, "federation.num_rounds=1", "federation.fraction=0.5"), tmp_path / "run")
    charges = ledger_lines(run.folder, "server")
    named = [(0, "evidence-0"), (0, "evidence-1"), (1, "train")]
    assert [charge["key"] for charge in charges] == [["simulation", *release] for release in named]
    begun = rdp_epsilon(releases(charges[:2]))
    assert begun == pytest.approx(4, rel=0.03)
    told = {client: account["epsilon"] for client, account in run.claim.final(simulated=True)["clients"].items()}
    drawn = set(run.records[1].clients)
    assert len(drawn) == 2
    for client, epsilon in told.items():
        assert epsilon == pytest.approx(rdp_epsilon(releases(charges)) if client in drawn else begun, rel=2e-3)
    assert max(told.values()) <= 8
    assert "privacy: the start's sketch has a signal-to-noise of at most" in run.printed


def test_the_start_released_is_that_of_a_slow_oracle(tiny_bert: Path, tmp_path: Path) -> None:
    """Each client's sketch clipped over all modules together, summed, noised and divided by all clients; some lie above the bound."""
    more = (*START, "privacy=client", "privacy.noise_multiplier=0.5", "privacy.init_fraction=0.5", "federation.weighting=uniform")
    run = run_privately(small(tiny_bert, tmp_path, *more, "federation.num_rounds=1", "privacy.init_norm=0.008"), tmp_path / "run")
    sketch = sketch_of(run.config.init, run.config.adapter.rank, run.config.seed)
    multiplier = releases(ledger_lines(run.folder, "server")[:1])[0][0]
    means, norms = [], []
    for number, stage in enumerate(("range", "core")):
        layout = reply_layout(sketch, run.prepared.adapted.shapes, stage)
        exchanges = [e for e in run.grid.rounds("train.evidence")[0] if e.instruction.stage == f"{stage}.{number}"]
        sketches = [e.answer.state(layout).map(torch.Tensor.double) for e in exchanges]
        norms += [math.sqrt(squared_norm(one)) for one in sketches]
        stream = torch_generator(run.config.seed, "server-noise", f"start-{number}")
        noise = sketches[0].map(lambda t, stream=stream: torch.randn(t.shape, generator=stream, dtype=torch.float64))  # type: ignore[misc]
        shares = [min(1.0, 0.008 / math.sqrt(squared_norm(one))) for one in sketches]
        total = {n: sum(share * one[n] for share, one in zip(shares, sketches, strict=True)) + multiplier * 0.008 * noise[n] for n in noise}
        means.append(State({name: t / len(sketches) for name, t in total.items()}))
        assert len(sketches) == 4
    assert min(norms[:4]) < 0.008 < max(norms[:4])
    wanted = sketch.finish(means[1], sketch.basis(means[0]))
    basis = run.prepared.strategy.frozen.view().basis
    for name, t in basis.items():
        torch.testing.assert_close(t, wanted[name], rtol=0, atol=1e-5)


def test_a_start_without_noise_takes_epsilon_away(tiny_bert: Path, tmp_path: Path) -> None:
    run = run_privately(small(tiny_bert, tmp_path, *START, *CLIENT, "federation.num_rounds=1"), tmp_path / "run")
    assert run.claim.final(simulated=True) is None
    assert "the start uses private data without noise" in run.claim.why_none()
    assert "privacy: no epsilon will be claimed" in run.printed
    assert all(record.epsilon is None for record in run.records)


def test_an_adaptive_bound_moves_and_is_kept_between_rounds(tiny_bert: Path, tmp_path: Path) -> None:
    """Far too wide at first: each round brings it down, by the rule and the stream of its own noise."""
    more = ("privacy=client", "privacy.noise_multiplier=0.5", "federation.weighting=uniform", "federation.num_rounds=3")
    adaptive = ("privacy.clipping=adaptive", "privacy.max_grad_norm=5", "privacy.count_noise=0.4", "privacy.quantile_lr=0.5")
    run = run_privately(small(tiny_bert, tmp_path, *more, *adaptive), tmp_path / "run")
    bounds = [record.extras["clip_norm"] for record in run.records[1:]]
    assert bounds[0] == 5
    bound = 5.0
    for number, shown in enumerate(bounds, start=1):
        assert shown == pytest.approx(bound)
        stream = torch_generator(run.config.seed, "server-noise", f"round-{number}")
        for _, shape in run.prepared.adapted.layouts.down.shapes:
            torch.randn(shape, generator=stream, dtype=torch.float64)
        count = 2.0 + 0.4 * float(torch.randn((), generator=stream, dtype=torch.float64))  # all four within the bound
        bound *= math.exp(-0.5 * (count / 4 + 0.5 - 0.5))
        sum_multiplier = (0.5**-2 - (2 * 0.4) ** -2) ** -0.5
        assert run.records[number].extras["noise_std"] == pytest.approx(sum_multiplier * shown / 4)
    assert len(set(bounds)) == 3
    assert {charge["entries"][0]["noise_multiplier"] for charge in ledger_lines(run.folder, "server")} == {0.5}
