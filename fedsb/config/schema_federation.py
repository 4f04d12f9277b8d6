"""The typed configuration of the group ``federation``; the others stand in :mod:`fedsb.config.schema`."""

from __future__ import annotations

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, config=STRICT)
class PartitionConfig:
    """How a simulation deals the training part out to clients."""

    kind: str | None
    alpha: float
    shards_per_client: int
    column: str | None
    sizes: tuple[float, ...] | None
    groups: int


@dataclass(frozen=True, config=STRICT)
class ServerOptimizerConfig:
    """The optimiser that acts on the mean update."""

    name: str
    lr: float
    momentum: float
    betas: tuple[float, float]
    eps: float


@dataclass(frozen=True, config=STRICT)
class FederationConfig:
    """Who takes part, how often, and how replies are weighted."""

    num_clients: int
    names: tuple[str, ...] | None
    num_rounds: int
    fraction: float
    weighting: str
    cutoff: int
    min_replies: int | None
    replace_nodes: bool
    node_keys: str | None
    lost_state: str
    timeout: float
    wait: float
    evaluate_clients: bool
    ranks: tuple[int, ...] | None
    wire_dtype: str
    error_feedback: bool
    exactness: bool
    secure_sum: bool
    secure_dropout: float
    secure_bound: float | None
    partition: PartitionConfig
    server_optimizer: ServerOptimizerConfig
