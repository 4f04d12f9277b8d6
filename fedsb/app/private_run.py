"""What privacy asks of a run, between the configuration and its parts: the plans of all releases, and what is said of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedsb.config.compose import as_dict
from fedsb.config.derived import client_names, start_kind
from fedsb.config.schema import Config
from fedsb.core.cohort import cohort_size, draw_cohort, evaluated_rounds
from fedsb.core.disk import make_folder, replace_whole
from fedsb.core.errors import UserError
from fedsb.core.logs import say_early
from fedsb.privacy.account import LEDGERS, charged_account
from fedsb.privacy.charges import Key
from fedsb.privacy.claim import Claim
from fedsb.privacy.entries import Entry
from fedsb.privacy.forecast import forecast_snr
from fedsb.privacy.ledger import SIMULATION, Ledger, read_header
from fedsb.privacy.notices import forecast_line, privacy_lines
from fedsb.privacy.plan import Plan, ServerPlan, make_plan, make_server_plan, unnoised_start
from fedsb.run.resuming import fingerprint
from fedsb.wire.sketch_layouts import sketch_of

PLANS = "plans.json"
KEPT_PLANS = 8  # beside one ledger of a real node


def client_plans(config: Config, sizes: Mapping[str, int]) -> dict[str, Plan]:
    """Return what each client will release under ``privacy.unit=example``, from how many examples it says it has.

    Raises:
        UserError: the privacy asked for cannot be had with these clients or this schedule.
    """
    if len(sizes) > 1 and config.privacy.epsilon is not None:
        # Some seconds for each size of client, before there is a run that could show its progress.
        say_early(f"privacy: calibrating the noise of {len(sizes)} clients …", progress=config.progress)
    return {client: plan_of(config, client, count) for client, count in sorted(sizes.items())}


def save_plans(folder: Path, plans: Mapping[str, Plan]) -> None:
    """Leave the plans of a simulation where its clients find them: each process would calibrate them anew, seconds a client."""
    make_folder(folder)
    replace_whole(folder / PLANS, json.dumps({name: asdict(plan) for name, plan in plans.items()}))


def add_plan(folder: Path, name: str, plan: Plan) -> None:
    """Leave a real client's plan beside its ledger, and there the plans that came before it, the last few."""
    earlier = {other: held for other in _saved(folder) if other != name and (held := saved_plan(folder, other)) is not None}
    save_plans(folder, {**dict(list(earlier.items())[-KEPT_PLANS + 1 :]), name: plan})


def saved_plan(folder: Path, name: str) -> Plan | None:
    """Return a client's plan as it was left; None where there is none."""
    found = _saved(folder).get(name)
    if found is None:
        return None
    entries = {key: Entry(**held) if (held := found.pop(key, None)) else None for key in ("start", "evaluation")}
    rounds = {key: tuple(found.pop(key, ())) for key in ("rounds", "evaluated")}
    return Plan(**{**found, "training": Entry(**found["training"]), **entries, **rounds})


def _saved(folder: Path) -> dict[str, Any]:
    path = folder / PLANS
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def plan_of(config: Config, client: str, num_examples: int) -> Plan:
    """Return what a client will release in the run under ``privacy.unit=example``.

    Raises:
        UserError: see :func:`fedsb.privacy.plan.make_plan`.
    """
    return make_plan(
        config.privacy,
        config.train,
        client=client,
        num_examples=num_examples,
        rounds=drawn_rounds(config).get(client, ()),
        exchanges=private_exchanges(config),
        evidence_examples=config.init.num_examples,
        evaluated=evaluating_rounds(config).get(client, ()),
    )


def server_plan_of(config: Config) -> ServerPlan:
    """Return what the server will release in the run under ``privacy.unit=client``.

    Raises:
        UserError: see :func:`fedsb.privacy.plan.make_server_plan`.
    """
    return make_server_plan(config.privacy, drawn_rounds(config), exchanges=private_exchanges(config))


def drawn_rounds(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the rounds that each client is drawn for."""
    federation, names = config.federation, client_names(config)
    size = cohort_size(len(names), federation.fraction)
    cohorts = {n: draw_cohort(names, size, seed=config.seed, round_number=n) for n in range(1, federation.num_rounds + 1)}
    return {client: tuple(number for number, cohort in cohorts.items() if client in cohort) for client in names}


def evaluating_rounds(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the rounds after which each client is asked for metrics: the cohort's in those that are evaluated, all in the last."""
    federation = config.federation
    if not federation.evaluate_clients:
        return {}
    last, due = federation.num_rounds, sorted(evaluated_rounds(config.eval.every, federation.num_rounds))
    return {client: tuple(n for n in due if n == last or n in drawn) for client, drawn in drawn_rounds(config).items()}


class ServerBooks:
    """The server's own ledger of client-level privacy: charged before each release, and what every client's account is read from.

    Args:
        folder: of the run's ledgers.
        config: of the run; the ledger is kept for it and no other.
        plan: the releases.
        simulated: tells whether the noise comes from the seed: a round that is repeated after a crash then releases the same numbers.

    Raises:
        UserError: the folder holds the ledger of another run.
    """

    def __init__(self, folder: Path, config: Config, plan: ServerPlan, *, simulated: Callable[[], bool] = lambda: False) -> None:
        self.simulated = simulated
        privacy = config.privacy
        self._ledger = Ledger(folder / "server", {"unit": privacy.unit, "privacy": asdict(privacy), "run": fingerprint(config)})
        self._run = folder.parent.name
        self._accountant = privacy.accountant
        self._plan = plan

    def charge(self, round_number: int, exchange: str, clients: Sequence[str]) -> None:
        """Enter a release that covers some clients; an exchange of a start without noise is none."""
        simulated = self.simulated()
        key = Key(SIMULATION if simulated else self._run, round_number, exchange)
        entry = self._plan.training if round_number else self._plan.start
        entries = (entry,) if entry else ()
        if not (simulated and self._ledger.holds(key, entries)):
            self._ledger.charge(key, entries, clients=clients)

    def accounts(self) -> dict[str, dict[str, float]]:
        """Return the accounts of all clients."""
        return {client: self._plan.account(self._ledger.entries_of(client), self._accountant) for client in self._plan.rounds}


def open_accounts(
    config: Config, folder: Path, plans: Mapping[str, Plan], server_plan: ServerPlan | None
) -> tuple[Claim, ServerBooks | None]:
    """Return what gathers a run's accounts, and under client-level privacy the server's books; leave the plans for simulated clients.

    Raises:
        UserError: the folder holds the ledger of another run.
    """
    privacy, ledgers = config.privacy, folder / LEDGERS

    def charged(client: str) -> dict[str, float] | None:
        return charged_account(ledgers, client, plans.get(client), privacy.accountant)

    if plans:
        save_plans(ledgers, plans)
    claim = Claim(privacy.unit, privacy.accountant, reason_of(config), charged, privacy.epsilon)
    return claim, ServerBooks(ledgers, config, server_plan) if server_plan else None


def check_ledgers(config: Config, folder: Path) -> None:
    """Hold the ledgers in a resumed run's folder against its configuration before anyone is asked for anything.

    Raises:
        UserError: one was kept for another configuration, or its first line cannot be read.
    """
    for path in sorted((folder / LEDGERS).glob("*/ledger.jsonl")):
        header = read_header(path.parent)
        if header and (header.get("run") != fingerprint(config) or header.get("privacy") != as_dict(config.privacy)):
            raise UserError(f"resume={folder}: the ledger '{path}' was kept for another configuration; bring back the run's own")


def private_exchanges(config: Config) -> int:
    """Return how many exchanges of the start are charged to the ledgers: none where it needs no private data, or has no noise."""
    if start_kind(config) != "gradient" or config.init.evidence != "clients" or not config.privacy.init_fraction:
        return 0
    return len(sketch_of(config.init, config.adapter.rank, config.seed).exchanges)


def forecast(config: Config, plans: Sequence[Plan | ServerPlan], shapes: Mapping[str, tuple[int, int]]) -> str:
    """Return the line on the signal-to-noise that a private start can have at most."""
    return forecast_line(start_snr(config, plans, shapes), max(plan.start.noise_multiplier for plan in plans if plan.start is not None))


def start_snr(config: Config, plans: Sequence[Plan | ServerPlan], shapes: Mapping[str, tuple[int, int]]) -> float:
    """Return the signal-to-noise that a private start's sketches can have at most, over all who add noise to them.

    The mean of the clients' sketches is at most C long, for no client's own is longer (on average over its samples); the noise on client
    i's is σ_i C / E_i an entry, with E_i examples expected.
    """
    noise = math.sqrt(sum((weight * spread) ** 2 for weight, spread in _parties(config, plans)))
    sketch = sketch_of(config.init, config.adapter.rank, config.seed)
    return min(forecast_snr(noise, config.privacy.init_norm, 1.0, shapes, sketch.width, side) for side in ("right", "left"))


def _parties(config: Config, plans: Sequence[Plan | ServerPlan]) -> list[tuple[float, float]]:
    """Return the weight in the mean and σ / E of everyone who adds noise to a start."""
    clients = [(plan, plan.start) for plan in plans if isinstance(plan, Plan) and plan.start is not None]
    if not clients:
        return [(1.0, plan.start.noise_multiplier / config.federation.num_clients) for plan in plans if plan.start is not None]
    weights = [float(plan.num_examples) if config.federation.weighting == "examples" else 1.0 for plan, _ in clients]
    spreads = [start.noise_multiplier / (start.sampling_rate * plan.num_examples) for plan, start in clients]
    return [(weight / sum(weights), spread) for weight, spread in zip(weights, spreads, strict=True)]


def reason_of(config: Config) -> str | None:
    """Return why no epsilon can be claimed, whatever the ledgers say; None where one can."""
    return unnoised_start(config.privacy, start_kind(config), config.init.evidence)


def opening_lines(config: Config, plans: Sequence[Plan | ServerPlan], shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Return what a private run says before its first round."""
    kind, evidence = start_kind(config), config.init.evidence
    lines = privacy_lines(
        config.privacy.unit,
        plans,
        start=kind,
        evidence=evidence,
        reason=reason_of(config),
        calibrated=config.privacy.epsilon is not None,
        budget=config.privacy.max_epsilon,
    )
    noised = [plan for plan in plans if plan.start is not None]
    return [*lines, forecast(config, noised, shapes)] if noised else lines
