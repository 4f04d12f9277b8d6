"""What privacy asks of a run, between the configuration and its parts: the plans of all releases, and what is said of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from fedsb.assembly import client_examples, parts_of
from fedsb.models import AdaptedModel
from fedsb.privacy.accounting import Entry
from fedsb.privacy.forecast import forecast_snr
from fedsb.privacy.ledger import Key, Ledger
from fedsb.privacy.models import refuse_mixing_layers
from fedsb.privacy.notices import forecast_line, privacy_lines
from fedsb.privacy.plan import Plan, ServerPlan, make_plan, make_server_plan, unnoised_start
from fedsb.rules import client_names, cohort_size, start_kind
from fedsb.schedule import draw_cohort
from fedsb.schema import Config, PrivacyConfig
from fedsb.sketching import sketch_of

PLANS = "plans.json"


def plans_of(config: Config, adapted: AdaptedModel, labels: tuple[str, ...]) -> tuple[dict[str, Plan], ServerPlan | None]:
    """Return what each simulated client, or the server, will release; nothing without privacy.

    Raises:
        UserError: the privacy asked for cannot be had with this model, these clients or this schedule.
    """
    if config.privacy.unit == "client":
        return {}, server_plan_of(config)
    if config.privacy.unit == "none":
        return {}, None
    refuse_mixing_layers(adapted.model)
    clients = parts_of(config)
    if len(clients) > 1 and config.privacy.epsilon is not None:
        # Some seconds for each size of client, before there is a run that could show its progress.
        print(f"privacy: calibrating the noise of {len(clients)} clients …", flush=True)
    return {name: plan_of(config, name, len(client_examples(config, name, None, labels)[0])) for name in clients}, None


def save_plans(folder: Path, plans: Mapping[str, Plan]) -> None:
    """Leave the plans of a simulation where its clients find them: each process would calibrate them anew, seconds a client."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f"{PLANS}.part"
    scratch.write_text(json.dumps({client: asdict(plan) for client, plan in plans.items()}), encoding="utf-8")
    scratch.replace(folder / PLANS)


def saved_plan(folder: Path, client: str) -> Plan | None:
    """Return a simulated client's plan as the server left it; None where it left none."""
    path = folder / PLANS
    found = json.loads(path.read_text(encoding="utf-8")).get(client) if path.is_file() else None
    if found is None:
        return None
    start = found.pop("start")
    fields = {**found, "training": Entry(**found["training"]), "rounds": tuple(found["rounds"])}
    return Plan(**fields, start=Entry(**start) if start else None)


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


def server_charge(folder: Path, privacy: PrivacyConfig, plan: ServerPlan) -> Callable[[int, str], None]:
    """Open the server's ledger of client-level privacy and return what charges a release, (round, exchange), to it.

    Raises:
        UserError: the folder holds the ledger of another run.
    """
    ledger = Ledger(folder / "server", {"unit": privacy.unit, "privacy": asdict(privacy)})

    def charge(round_number: int, exchange: str) -> None:
        entry = plan.training if round_number else plan.start
        ledger.charge(Key(folder.parent.name, round_number, exchange), (entry,) if entry else ())

    return charge


def private_exchanges(config: Config) -> int:
    """Return how many exchanges of the start are charged to the ledgers: none where it needs no private data, or has no noise."""
    if start_kind(config) != "gradient" or config.init.evidence != "clients" or not config.privacy.init_fraction:
        return 0
    return len(sketch_of(config.init, config.adapter.rank, config.seed).exchanges)


def forecast(config: Config, plans: Sequence[Plan | ServerPlan], shapes: Mapping[str, tuple[int, int]]) -> str:
    """Return the line on the signal-to-noise that a private start can have at most, over all who add noise to it."""
    starts = [plan.start for plan in plans if plan.start is not None]
    sketch = sketch_of(config.init, config.adapter.rank, config.seed)
    noise = math.sqrt(sum(start.noise_multiplier**2 for start in starts))
    shown = starts[0].noise_multiplier
    parties = [plan.num_examples * start.sampling_rate for plan, start in zip(plans, starts, strict=True) if isinstance(plan, Plan)]
    expected = sum(parties) or float(config.federation.num_clients)
    return forecast_line(
        min(forecast_snr(noise, config.privacy.init_norm, expected, shapes, sketch.width, side) for side in ("right", "left")), shown
    )


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
