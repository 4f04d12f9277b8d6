"""What a client holds the weights and the bound of a secure sum against.

By many sums of the same values, weighted, cut or rounded otherwise, a server could tell one client's from the others', and by one sum in
which the others' changes are none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

from fedsb.config.derived import family
from fedsb.config.largest_change import largest_change
from fedsb.config.schema import Config
from fedsb.config.schema_federation import FederationConfig
from fedsb.secure.session import SecureError
from fedsb.wire.secured import Secured

# What a client knows of its own weight, by federation.weighting; None: nothing.
OWN_WEIGHTS: Mapping[str, Callable[[int], float | None]] = {"examples": float, "uniform": lambda count: 1.0, "fedau": lambda count: None}
ONE_STEP = "the first step of who begins anew in a factor of its own changes nothing that it uploads: the sum would be another's upload"
MOST_BOUND = 1000.0  # times a client's own: of 31 bits some 21 are left to its values, about as many as float32 has


def hold_weights(federation: FederationConfig, told: Secured, client: str, count: int) -> None:
    """Hold the weights of a round's clients against what one of them knows.

    Raises:
        SecureError: its own is another, or under ``fedau`` one is none that a client can have come to.
    """
    own = OWN_WEIGHTS[federation.weighting](count)
    if own is None:
        if odd := [name for name, weight in zip(told.members, told.weights, strict=True) if not 1 <= weight <= federation.cutoff]:
            raise SecureError(f"the server gives '{odd[0]}' a weight outside [1, {federation.cutoff}], where those of fedau lie")
    elif told.weights[told.members.index(client)] != own:
        raise SecureError(f"the server gives '{client}' another weight than {own:g}, which is its own")


def bound_of(config: Config, examples: int) -> float:
    """Return the largest change of a value in a round of a client with so many examples, or fewer."""
    found = config.federation.secure_bound or largest_change(config.train, config.privacy, examples)
    assert found is not None  # by fedsb.config.checks_secure
    return found


def hold_bound(config: Config, told: float, count: int) -> None:
    """Hold the bound of a round against a client's own: no value of it is cut where it follows from the steps.

    Raises:
        SecureError: it is not the run's, or, where it follows from the steps of the client with the most, far from this one's.
    """
    own = bound_of(config, count)
    most = own if config.federation.secure_bound else MOST_BOUND * own
    if not own <= told <= most:
        raise SecureError(f"the server gives {told:g} as the bound of a change, and this client's is {own:g}; give federation.secure_bound")


def hold_own(config: Config, own: int, answered: Collection[int], count: int) -> None:
    """Hold from what of its own a client is to go on, where it keeps a factor for itself: one that is zero lets the other not move.

    Args:
        config: of the run.
        own: the round that it kept this in, as the server says; 0: the start.
        answered: earlier rounds of the run whose sums, in which it was, it has helped to unmask.
        count: its training examples.

    Raises:
        SecureError: it has kept something in a round that has counted since, or takes one step in a round.
    """
    if not family(config).own:
        return
    if own < max(answered, default=0):
        raise SecureError(
            f"the server has this client go on from what it kept in round {own}, and it was in the sum of round {max(answered)}"
        )
    train = config.train
    if config.privacy.unit != "example" and train.local_epochs * math.ceil(count / train.batch_size) == 1 and not train.local_steps:
        raise SecureError(f"{count} examples are one step a round, and {ONE_STEP}; lower train.batch_size")
