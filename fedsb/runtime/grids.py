"""The runtimes of ``fedsb run`` by name."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any

from fedsb.config.schema import Config
from fedsb.runtime.grid import SimulationGrid
from fedsb.runtime.local import LocalGrid
from fedsb.runtime.stack_size import stack_size

CLIENT = "fedsb.app.answers:app"
TOGETHER = "fedsb.client_stack:answer_together"


def grid_for(config: Config, run_config: dict[str, Any]) -> SimulationGrid:
    """Return the grid of a run, with nodes that serve any logical client.

    Raises:
        UserError: what it needs is not there.
        RunError: Ray does not start on this machine.
    """
    return GRIDS[config.runtime.kind](config, run_config, stack_size(config))


def _local(config: Config, run_config: dict[str, Any], stack: int) -> SimulationGrid:
    together = pkgutil.resolve_name(TOGETHER) if stack > 1 else None
    return LocalGrid.simulation(pkgutil.resolve_name(CLIENT), run_config, stack=stack, together=together)


def _ray(config: Config, run_config: dict[str, Any], stack: int) -> SimulationGrid:
    # Ray takes a second to import.
    from fedsb.runtime.pool import PoolSettings, pool_for
    from fedsb.runtime.ray import RayGrid

    runtime = config.runtime
    cpus = float(runtime.threads) if runtime.cpus is None else runtime.cpus
    settings = PoolSettings(
        CLIENT, TOGETHER, workers=runtime.workers, cpus=cpus, gpus=runtime.gpus, device=config.device, address=runtime.address
    )
    return RayGrid.simulation(
        pool_for(settings),
        run_config,
        max_retries=runtime.max_retries,
        client_timeout=runtime.client_timeout,
        stack=stack,
    )


GRIDS: dict[str, Callable[[Config, dict[str, Any], int], SimulationGrid]] = {"local": _local, "ray": _ray}
