"""What a method goes together with, read off its rule and its family: privacy of whole clients, ranks, server optimisers, weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedsb.adapters import AdapterSpec
from fedsb.core.errors import UserError
from strategies.method import Method
from strategies.weighting import WEIGHTINGS, Fixed


@dataclass(frozen=True)
class Wanted:
    """What a run asks for beside its method.

    Attributes:
        client_unit: whether the server noises the sum of the uploads.
        ranks: of the clients, where they have ranks of their own.
        server_optimizer: whether one acts on the mean update.
        weighting: key of :data:`strategies.weighting.WEIGHTINGS`.
        secure_sum: whether the server is to get no more than the sum of a round's uploads.
    """

    client_unit: bool = False
    ranks: tuple[int, ...] = ()
    server_optimizer: bool = False
    weighting: str = "examples"
    secure_sum: bool = False


def check_wanted(method: type[Method], spec: AdapterSpec, wanted: Wanted, name: str) -> None:
    """Hold what is asked for against a method.

    Args:
        method: the strategy's class.
        spec: the adapter family.
        wanted: what is asked for.
        name: what the method is called to the user.

    Raises:
        UserError: it does not go with the method.
    """
    for refuse in REFUSALS:
        if said := refuse(method, spec, wanted):
            raise UserError(said.format(name=name))


def _client_unit(method: type[Method], spec: AdapterSpec, wanted: Wanted) -> str:
    if not wanted.client_unit or method.needs_a_mean_alone():
        return ""
    return (
        "privacy.unit=client is not defined for {name}: noise on the sum of the uploads covers what follows from their mean over a fixed "
        "number of clients, and this method makes more of the uploads than that; use one that needs a mean alone, such as method=fed_sb"
    )


def _ranks(method: type[Method], spec: AdapterSpec, wanted: Wanted) -> str:
    if not wanted.ranks or method.any_rank:
        return ""
    return (
        f"federation.ranks={sorted(set(wanted.ranks))}: {{name}} averages factors of one shape; use federation.ranks=null, or a method "
        "that takes several, such as method=flexlora"
    )


def _server_optimizer(method: type[Method], spec: AdapterSpec, wanted: Wanted) -> str:
    hands_out_the_mean = spec.turns == 1 and set(spec.uploaded(1)) == set(spec.in_state) and spec.uploads
    if not wanted.server_optimizer or (method.is_the_mean() and hands_out_the_mean):
        return ""
    return (
        "federation.server_optimizer is not defined with {name}: it moves one mean from round to round, and this method hands out more "
        "than that, or another one each round; use federation.server_optimizer.name=none or another method"
    )


def _weighting(method: type[Method], spec: AdapterSpec, wanted: Wanted) -> str:
    if isinstance(WEIGHTINGS[wanted.weighting]((), 1), Fixed) or (method.is_the_mean() and spec.uploads):
        return ""
    return (
        f"federation.weighting={wanted.weighting} scales the mean update, and what {{name}} hands out is more than a mean; use "
        "federation.weighting=examples or another method"
    )


def _secure_sum(method: type[Method], spec: AdapterSpec, wanted: Wanted) -> str:
    if not wanted.secure_sum or (method.needs_a_mean_alone() and spec.uploads):
        return ""
    why = "makes more of the uploads than their mean, and the server would not see them" if spec.uploads else "uploads nothing"
    return f"federation.secure_sum=true is not defined with {{name}}, which {why}; use one that needs a mean alone, such as method=fed_sb"


REFUSALS: tuple[Callable[[type[Method], AdapterSpec, Wanted], str], ...] = (
    _client_unit,
    _ranks,
    _server_optimizer,
    _weighting,
    _secure_sum,
)
