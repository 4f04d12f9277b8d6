"""What a configuration will move over the wire, foretold from shapes and the schedule, to the byte.

The same rules as on the wire, without a wire: who is drawn in which round, which version of the frozen log each client holds, when
the dense sum replaces factors. A run in which every reply counts measures exactly these payloads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedsb.adapters import AdapterSpec
from fedsb.config.derived import client_names, start_kind
from fedsb.config.schema import Config
from fedsb.core.cohort import cohort_size, draw_cohort
from fedsb.core.errors import UserError
from fedsb.core.state import Layout
from fedsb.wire.byte_counts import state_bytes
from fedsb.wire.frozen import dense_is_cheaper
from fedsb.wire.sketch_layouts import probe_layout, reply_layout, sketch_of

Shapes = Mapping[str, tuple[int, int]]
ResidualRank = Callable[..., int]


@dataclass(frozen=True)
class Cost:
    """What a method costs.

    Attributes:
        method, rank: which; no rank without adapters.
        trained: values that a client trains, head included.
        up, down: values a client and round in the steady state (every client takes part in every round).
        one_off: values a client receives and sends once, start included.
        bytes_up, bytes_down: the same in bytes on the wire.
        payload_up, payload_down, payload_one_off: bytes over the whole run and all clients.
    """

    method: str
    rank: int | None
    trained: int
    up: int
    down: int
    one_off: int
    bytes_up: int
    bytes_down: int
    payload_up: int
    payload_down: int
    payload_one_off: int

    @property
    def payload(self) -> int:
        """Bytes over the whole run, the one-off included."""
        return self.payload_up + self.payload_down + self.payload_one_off


def method_cost(config: Config, spec: AdapterSpec, layout: Layout, shapes: Shapes, *, residual_rank: ResidualRank) -> Cost:
    """Foretell what a run costs.

    Args:
        config: method, schedule, start and wire.
        spec: the adapter family.
        layout: of what is trained and travels.
        shapes: (m, n) of the adapted modules.
        residual_rank: the method's own, see :meth:`strategies.base.LowRankStrategy.residual_rank`.
    """
    residual = residual_ranks(config, shapes, residual_rank)
    basis = sum(math.prod(spec.shape(role, *shape, config.adapter.rank)) for shape in shapes.values() for role in spec.frozen)
    start_up, start_down = start_values(config, shapes)
    up, down, one_off = _run_bytes(config, layout.numel, shapes, residual=residual, basis=basis)
    clients = config.federation.num_clients
    return Cost(
        method=config.method.name,
        rank=config.adapter.rank if spec.factors else None,
        trained=layout.numel,
        up=layout.numel,
        down=layout.numel + residual_values(shapes, [residual]),
        one_off=basis + start_up + start_down,
        bytes_up=state_bytes(layout.numel, config.federation.wire_dtype),
        bytes_down=state_bytes(layout.numel, config.federation.wire_dtype) + state_bytes(residual_values(shapes, [residual])),
        payload_up=up,
        payload_down=down,
        payload_one_off=one_off + clients * state_bytes(start_up + start_down),
    )


def residual_ranks(config: Config, shapes: Shapes, rank_of: ResidualRank) -> dict[str, int]:
    """Return the rank of a round's residual by module; empty for a method without one."""
    federation = config.federation
    cohort = cohort_size(federation.num_clients, federation.fraction)
    coarse = federation.wire_dtype != "float32"
    try:
        rank = rank_of(cohort, config.adapter.rank, coarse=coarse, **config.method.options)
    except TypeError as error:
        raise UserError(f"method '{config.method.name}' does not take method.options {', '.join(config.method.options)}: {error}") from None
    return dict.fromkeys(shapes, rank) if rank else {}


def residual_values(shapes: Shapes, versions: Sequence[Mapping[str, int]]) -> int:
    """Return the values of a bundle that spans these versions of the residual: factors, or the dense sum where it is smaller."""
    total = 0
    for module, (m, n) in shapes.items():
        rank = sum(version.get(module, 0) for version in versions)
        total += m * n if dense_is_cheaper(rank, m, n) else rank * (m + n)
    return total


def start_values(config: Config, shapes: Shapes) -> tuple[int, int]:
    """Return the values that each client sends and receives during a gradient start with the clients' evidence."""
    if start_kind(config) != "gradient" or config.init.evidence != "clients":
        return 0, 0
    sketch = sketch_of(config.init, config.adapter.rank, config.seed)
    stages = list(enumerate(sketch.exchanges))
    sent = sum(reply_layout(sketch, shapes, stage).numel for _, stage in stages)
    received = sum(probe_layout(sketch, shapes, stage, first=number == 0).numel for number, stage in stages)
    return sent, received


def _run_bytes(config: Config, numel: int, shapes: Shapes, *, residual: Mapping[str, int], basis: int) -> tuple[int, int, int]:
    """Walk through the schedule and return bytes up, down and one-off (the basis) over all clients."""
    federation, names = config.federation, client_names(config)
    size, dtype = cohort_size(len(names), federation.fraction), federation.wire_dtype
    held: dict[str, int] = {}
    up = down = one_off = version = 0
    for number in range(1, federation.num_rounds + 1):
        cohort = draw_cohort(names, size, seed=config.seed, round_number=number)
        for evaluating in (False, True) if federation.evaluate_clients else (False,):
            version += 1 if evaluating and residual else 0
            for client in cohort:
                down += state_bytes(numel, dtype) + state_bytes(residual_values(shapes, [residual] * (version - held.get(client, 0))))
                one_off += 0 if client in held else state_bytes(basis)
                up += 0 if evaluating else state_bytes(numel, dtype)
                held[client] = version
        version += 1 if residual and not federation.evaluate_clients else 0
    return up, down, one_off
