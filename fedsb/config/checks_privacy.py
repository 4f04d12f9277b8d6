"""What the privacy mechanism's keys may hold, and how they go together with others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedsb.config.derived import family, start_kind
from fedsb.config.schema import Config
from fedsb.core.errors import UserError

# The smallest C: far below it a float32's steps are longer than C, and its noise would be rounded away.
LEAST_NORM = 1e-6
# The largest: a billion gradients of that length do not overflow in float32, which would tell of them by a code.
LARGEST_NORM = 1e20

# What is for privacy.unit=example, and off by default.
OF_A_UNIT = ("max_epsilon", "init_normalise", "constant_time", "eval_fraction")

# As in fedsb/config/checks.py: key -> (condition, what is allowed).
PRIVACY_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "privacy.epsilon": (lambda v: v > 0, "above 0"),
    "privacy.noise_multiplier": (lambda v: 1e-6 <= v <= 1e6, "in [1e-6, 1e6]"),
    "privacy.delta": (lambda v: 0 < v < 1, "between 0 and 1"),
    "privacy.max_epsilon": (lambda v: v > 0, "above 0"),
    "privacy.max_grad_norm": (lambda v: LEAST_NORM <= v <= LARGEST_NORM, f"in [{LEAST_NORM:g}, {LARGEST_NORM:g}]"),
    "privacy.quantile": (lambda v: 0 < v < 1, "between 0 and 1"),
    "privacy.quantile_lr": (lambda v: v > 0, "above 0"),
    "privacy.count_noise": (lambda v: v > 0, "above 0"),
    "privacy.max_batch": (lambda v: v >= 1, "at least 1"),
    "privacy.init_fraction": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "privacy.eval_fraction": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "privacy.eval_max_loss": (lambda v: v > 0, "above 0"),
    "privacy.init_norm": (lambda v: LEAST_NORM <= v <= LARGEST_NORM, f"in [{LEAST_NORM:g}, {LARGEST_NORM:g}]"),
}


def _noise_is_given_once(config: Config) -> None:
    p = config.privacy
    given = [key for key in ("epsilon", "noise_multiplier") if getattr(p, key) is not None]
    wanted = given or [
        key for key in ("max_epsilon", "init_fraction", "init_normalise", "constant_time", "eval_fraction") if getattr(p, key)
    ]
    if p.unit == "none" and wanted:
        raise UserError(f"privacy.{wanted[0]} is given, but privacy.unit=none adds no noise; choose privacy=example or privacy=client")
    if p.unit != "none" and len(given) != 1:
        what = "both given: one follows from the other" if given else "not given"
        raise UserError(f"privacy.epsilon and privacy.noise_multiplier are {what}; give one of them, as in privacy.epsilon=3")


def _evaluation_has_noise(config: Config) -> None:
    privacy, evaluates = config.privacy, config.federation.evaluate_clients
    if privacy.unit == "client" and evaluates:
        raise UserError(
            "federation.evaluate_clients=true with privacy.unit=client: metrics on a client's held-out examples would tell of that client "
            "without noise; switch one of the two off"
        )
    if privacy.unit == "example" and evaluates and not privacy.eval_fraction:
        raise UserError(
            "federation.evaluate_clients=true with privacy.unit=example: metrics on a client's held-out examples would have no noise; give "
            "them a share of epsilon by privacy.eval_fraction=0.1, or leave federation.evaluate_clients out"
        )
    if privacy.unit == "example" and privacy.eval_fraction and not evaluates:
        raise UserError(
            f"privacy.eval_fraction={privacy.eval_fraction:g} is for metrics on what clients hold out, and none are asked for; set "
            "federation.evaluate_clients=true, or leave it out"
        )


def _shares_leave_some(config: Config) -> None:
    p = config.privacy
    if p.epsilon is not None and p.init_fraction + p.eval_fraction >= 1:
        raise UserError(
            f"privacy.init_fraction={p.init_fraction:g} and privacy.eval_fraction={p.eval_fraction:g} leave training nothing of epsilon; "
            "together they must be below 1"
        )


def _normalising_has_sketches(config: Config) -> None:
    if config.privacy.unit == "example" and config.privacy.init_normalise and not config.privacy.init_fraction:
        raise UserError(
            "privacy.init_normalise=true is for the noised sketches of a start, and privacy.init_fraction=0 has none; "
            "set privacy.init_fraction=0.1 with init.kind=gradient, or leave it out"
        )


def _client_unit_sums_equally(config: Config) -> None:
    if config.privacy.unit != "client":
        return
    if config.federation.weighting != "uniform":
        raise UserError(
            f"privacy.unit=client with federation.weighting={config.federation.weighting}: a client with a larger weight would be "
            "protected less; use federation.weighting=uniform"
        )
    if config.privacy.clipping == "per_layer":
        raise UserError("privacy.clipping=per_layer is for privacy.unit=example; use flat or adaptive with privacy.unit=client")


def _budget_covers_the_target(config: Config) -> None:
    p = config.privacy
    if p.max_epsilon is not None and p.epsilon is not None and p.max_epsilon < p.epsilon:
        raise UserError(
            f"privacy.max_epsilon={p.max_epsilon:g} is below privacy.epsilon={p.epsilon:g}: every client would refuse to spend "
            "what the run asks for; raise the one or lower the other"
        )


def _example_keys_have_their_unit(config: Config) -> None:
    p = config.privacy
    given = next((key for key in OF_A_UNIT if getattr(p, key)), None)
    if p.unit == "client" and given:
        raise UserError(
            f"privacy.{given}={getattr(p, given)} is for privacy.unit=example, where the clients themselves charge and clip; "
            "leave it out with privacy.unit=client"
        )


def _noise_is_not_blown_up(config: Config) -> None:
    train, kind = config.train, start_kind(config)
    at_zero = kind != "gradient" and kind not in family(config).shifting
    if config.privacy.unit == "example" and (train.preconditioner, train.optimizer) == ("riemannian", "sgd") and at_zero:
        raise UserError(
            f"train.preconditioner=riemannian with train.optimizer=sgd, privacy.unit=example and init.kind={kind}: B begins at zero, where "
            "the noise on A's gradient is multiplied by 1e6; use train.optimizer=adamw, or another start, such as init.kind=pissa"
        )


PRIVACY_RULES: tuple[Callable[[Config], None], ...] = (
    _noise_is_given_once,
    _evaluation_has_noise,
    _shares_leave_some,
    _normalising_has_sketches,
    _client_unit_sums_equally,
    _budget_covers_the_target,
    _example_keys_have_their_unit,
    _noise_is_not_blown_up,
)
