"""How the run of a baseline is laid out: what its method's YAML says in ``setting``, applied to the rest of the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from fedsb.config.schema import Config
from fedsb.core.cohort import cohort_size
from fedsb.core.errors import UserError

FEDERATED, POOLED, UNTOUCHED = "federated", "pooled", "untouched"


def laid_out(config: Config) -> Config:
    """Return a checked configuration as its method's setting has it; one that is laid out already stays as it is.

    Raises:
        UserError: what else it asks for does not go with the setting.
    """
    return SETTINGS[config.method.setting](config)


def _pooled(config: Config) -> Config:
    """One client holds everybody's examples and sees as many of them a round as all clients of a round would together."""
    f, steps, init = config.federation, config.train.local_steps, config.init
    sketched = init.kind == "gradient" and init.evidence == "clients"
    if config.privacy.unit == "client":
        raise UserError(
            f"privacy.unit=client with method={config.method.name}: one client holds everybody's examples, and would be the one that is "
            "protected; use privacy=example"
        )
    if steps is None and f.fraction < 1:
        raise UserError(
            f"method={config.method.name} with federation.fraction={f.fraction:g}: one client with all data would see more examples than "
            "the clients of a round do; set train.local_steps, which are then as many as all of them make, or federation.fraction=1"
        )
    if (steps is not None or sketched) and not f.num_clients:
        asked = f"train.local_steps={steps}" if steps is not None else f"init.num_examples={init.num_examples}"
        raise UserError(
            f"method={config.method.name} with federation.partition.kind=natural and {asked}: how many clients there are is not known yet, "
            "and so not how much all of them make of it; set federation.num_clients"
        )
    return replace(
        config,
        federation=replace(
            f, num_clients=1, names=None, ranks=None, fraction=1.0, min_replies=None, partition=replace(f.partition, kind="iid", sizes=None)
        ),
        train=replace(config.train, local_steps=None if steps is None else steps * cohort_size(f.num_clients, f.fraction)),
        init=replace(init, num_examples=init.num_examples * f.num_clients) if sketched else init,
    )


def _untouched(config: Config) -> Config:
    """Nobody trains: the base is measured, and that is all."""
    if config.privacy.unit != "none":
        raise UserError(f"privacy.unit={config.privacy.unit} with method={config.method.name}: nobody trains; leave privacy out")
    # A start away from W0, which a sweep may ask all its methods for, would be another model than the one that they begin with.
    return replace(config, federation=replace(config.federation, num_rounds=0), init=replace(config.init, kind="random"))


SETTINGS: Mapping[str, Callable[[Config], Config]] = {FEDERATED: lambda config: config, POOLED: _pooled, UNTOUCHED: _untouched}
