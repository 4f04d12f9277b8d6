"""Who takes part in a run, in how many rounds, and with which ranks: what of that goes together."""

from __future__ import annotations

from collections.abc import Callable

from fedsb.config.derived import family, start_kind
from fedsb.config.schema import Config
from fedsb.config.settings import UNTOUCHED
from fedsb.core.cohort import cohort_size
from fedsb.core.errors import UserError


def _ranks_fit(config: Config) -> None:
    ranks = config.federation.ranks
    if ranks is None:
        return
    if not ranks or min(ranks) < 1:
        raise UserError(f"federation.ranks={list(ranks)} must name ranks of at least 1, as in [4,8,16]; null gives all clients rank")
    if max(ranks) != config.adapter.rank:
        raise UserError(
            f"rank={config.adapter.rank} is not the largest of federation.ranks={list(ranks)}, which the server keeps; leave rank out, or "
            f"set rank={max(ranks)}"
        )


def _a_shifted_start_is_whole(config: Config) -> None:
    ranks, prune = config.federation.ranks, config.method.options.get("prune")
    key, given = ("federation.ranks", ranks and list(ranks)) if ranks is not None else ("method.options.prune", prune)
    if given is not None and start_kind(config) in family(config).shifting:
        raise UserError(
            f"init.kind={start_kind(config)} with {key}={given}: the whole product is taken out of W0, and a client of a smaller rank "
            f"would not put all of it back; use init.kind=random, or {key}=null"
        )


def _no_share_of_w0_is_cut_off(config: Config) -> None:
    energy, kind = config.method.options.get("energy"), start_kind(config)
    if energy not in (None, 1) and kind in family(config).shifting:
        raise UserError(
            f"method.options.energy={energy} with init.kind={kind}: the factors begin as a part of W0, of which that share would be kept "
            "and the rest lost; set method.options.energy=null, or init.kind=random"
        )


def _names_fit_clients(config: Config) -> None:
    names = config.federation.names
    if names is not None and len(set(names)) != config.federation.num_clients:
        raise UserError(
            f"federation.names gives {len(set(names))} different names for "
            f"federation.num_clients={config.federation.num_clients}; make the two equal"
        )


def _clients_are_counted(config: Config) -> None:
    natural = config.federation.partition.kind == "natural"
    if config.federation.num_clients == 0 and not (natural and config.federation.names is None):
        raise UserError("federation.num_clients=0 is out of range; it must be at least 1")


def _rounds_are_counted(config: Config) -> None:
    if config.federation.num_rounds == 0 and config.method.setting != UNTOUCHED:
        raise UserError("federation.num_rounds=0 is out of range; it must be at least 1 (method=untouched measures the base without any)")


def _every_turn_comes(config: Config) -> None:
    spec, rounds = family(config), config.federation.num_rounds
    rested = [role.name for role in spec.roles if isinstance(role.learns, int) and role.learns >= rounds]
    if rested and rounds:
        raise UserError(
            f"federation.num_rounds={rounds}: the factors of method '{config.method.name}' learn in {spec.turns} turns, one a round, and "
            f"{', '.join(rested)} would stay as the start made them; use at least {spec.turns}, or another method"
        )


def _cohort_can_answer(config: Config) -> None:
    if not config.federation.num_clients:
        return  # the data will tell
    drawn = cohort_size(config.federation.num_clients, config.federation.fraction)
    if (config.federation.min_replies or 1) > drawn:
        raise UserError(
            f"federation.min_replies={config.federation.min_replies} exceeds the {drawn} clients a round draws; "
            "lower it or raise federation.fraction"
        )


def _evaluation_has_examples(config: Config) -> None:
    served = config.data.path is None and config.data.test_path is not None  # to real nodes, whose operators may hold out a part
    if config.federation.evaluate_clients and not served and not config.data.client_test_fraction:
        raise UserError("federation.evaluate_clients=true needs held-out examples on the clients; set data.client_test_fraction=0.1, say")


FEDERATION_RULES: tuple[Callable[[Config], None], ...] = (
    _ranks_fit,
    _a_shifted_start_is_whole,
    _no_share_of_w0_is_cut_off,
    _names_fit_clients,
    _clients_are_counted,
    _rounds_are_counted,
    _every_turn_comes,
    _cohort_can_answer,
    _evaluation_has_examples,
)
