"""What a configuration will move over the wire, foretold from shapes and the schedule, to the byte.

The real frozen log is filled with shapes that have no values (torch's meta device), in the rounds of the real schedule, and asked what each
client lacks: all that a method tells it is what a round adds to the log (``growth``), and a test holds that against what it does add.
A run in which every reply counts measures exactly these payloads, or less with a method whose messages follow the data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedsb.adapters import AdapterSpec, Layouts
from fedsb.config.derived import client_names, start_kind
from fedsb.config.schema import Config
from fedsb.core.blocks import Sight
from fedsb.core.cohort import cohort_size, draw_cohort, evaluated_rounds
from fedsb.core.state import Layout, Name, State
from fedsb.wire.arrays import layout_bytes
from fedsb.wire.byte_counts import float32_bytes
from fedsb.wire.frozen import FrozenLog
from fedsb.wire.secured import bytes_down, bytes_up
from fedsb.wire.sketch_layouts import probe_layout, reply_layout, sketch_of

Shapes = Mapping[str, tuple[int, int]]
Growth = Callable[[int, Sequence[str]], State]  # (round, its clients) -> what it adds to the log, without values
LayoutsOf = Callable[[str], Layouts]


@dataclass(frozen=True)
class Cost:
    """What a method costs.

    Attributes:
        method, rank: which; no rank without adapters.
        trained: values that a client trains in the course of a run, head included.
        up, down: values a client and round in the steady state (every client takes part in every round), the mean over the turns. Of
            clients with ranks of their own these, what they train, and the one-off are means over them.
        one_off: values a client receives and sends once, start included.
        bytes_up, bytes_down: the same in bytes on the wire.
        payload_up, payload_down, payload_one_off: bytes over the whole run and all clients.
        rounds: of the run.
        evaluated: rounds in which clients are sent the state a second time, to evaluate it; in the bytes of the run alone.
        at_most: whether a run may move less, as its data have it.
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
    rounds: int
    evaluated: int = 0
    at_most: bool = False

    @property
    def payload(self) -> int:
        """Bytes over the whole run, the one-off included."""
        return self.payload_up + self.payload_down + self.payload_one_off


def method_cost(config: Config, spec: AdapterSpec, layouts: Layouts, shapes: Shapes, growth: Growth, layouts_of: LayoutsOf) -> Cost:
    """Foretell what a run costs.

    Args:
        config: method, schedule, start and wire.
        spec: the adapter family.
        layouts: of what travels.
        shapes: (m, n) of the adapted modules.
        growth: of the log; see :meth:`strategies.base.LowRankStrategy.growth`.
        layouts_of: each client's own.
    """
    rank, clients, dtype = config.adapter.rank, config.federation.num_clients, config.federation.wire_dtype
    up_bytes, beside = _upload_bytes(config)
    cohort = client_names(config)[: cohort_size(clients, config.federation.fraction)]
    each = [layouts_of(client) for client in client_names(config)] or [layouts]
    sizes = zip(*((one.learnt.numel, one.down.numel + one.asked.numel, one.log.numel) for one in each), strict=True)
    trained, down, basis = (sum(of_all) // len(each) for of_all in sizes)
    up = sum(layout.numel + one.told.numel for one in each for layout in one.up) // (spec.turns * len(each))
    sights = Counter(one.sight for one in each)
    logged = sum(_caught_up(growth, turn, cohort, sights) for turn in range(1, spec.turns + 1)) // (spec.turns * len(each))
    start_up, start_down = start_values(config, shapes)
    begun = without_values(layouts.log).merge(_shift(config, spec, shapes))
    bytes_up, bytes_down, bytes_one_off = _run_bytes(config, layouts_of, begun, growth)
    return Cost(
        method=config.method.name,
        rank=rank if spec.factors else None,
        trained=trained,
        up=up,
        down=down + logged,
        one_off=basis + start_up + start_down,
        bytes_up=sum(up_bytes(up) + layout_bytes(one.told, dtype) for one in each for up in one.up) // (spec.turns * len(each)),
        bytes_down=sum(layout_bytes(sent, dtype) for one in each for sent in (one.down, one.asked)) // len(each)
        + float32_bytes(logged)
        + beside,
        payload_up=bytes_up,
        payload_down=bytes_down,
        payload_one_off=bytes_one_off + clients * float32_bytes(start_up + start_down),
        rounds=config.federation.num_rounds,
        evaluated=len(_evaluating(config)),
    )


def _shift(config: Config, spec: AdapterSpec, shapes: Shapes) -> State:
    """Return what a start takes out of W0, in shapes alone."""
    if start_kind(config) not in spec.shifting:
        return State()
    factors = {
        Name(module, role): shape for module, (m, n) in shapes.items() for role, shape in spec.shapes(m, n, config.adapter.rank).items()
    }
    return spec.shift(without_values(Layout(tuple(sorted(factors.items())))), 1.0)


def without_values(layout: Layout) -> State:
    """Return a state of shapes alone."""
    return State({name: torch.empty(shape, device="meta") for name, shape in layout.shapes})


def _caught_up(growth: Growth, round_number: int, cohort: Sequence[str], sights: Mapping[Sight, int]) -> int:
    """Return the values that those who were there in a round are sent of what it added; so many of them have each sight."""
    log = FrozenLog()
    log.extend(growth(round_number, cohort), "1")
    return sum(number * bundle.state.numel for sight, number in sights.items() if (bundle := log.bundle(0, sight)))


def start_values(config: Config, shapes: Shapes) -> tuple[int, int]:
    """Return the values that each client sends and receives during a gradient start with the clients' evidence."""
    if start_kind(config) != "gradient" or config.init.evidence != "clients":
        return 0, 0
    sketch = sketch_of(config.init, config.adapter.rank, config.seed)
    stages = list(enumerate(sketch.exchanges))
    sent = sum(reply_layout(sketch, shapes, stage).numel for _, stage in stages)
    received = sum(probe_layout(sketch, shapes, stage, first=number == 0).numel for number, stage in stages)
    return sent, received


def _evaluating(config: Config) -> frozenset[int]:
    """Return the rounds in which clients evaluate: those of the schedule, and the start of a run without any."""
    federation = config.federation
    if not federation.evaluate_clients:
        return frozenset()
    return evaluated_rounds(config.eval.every, federation.num_rounds) - ({0} if federation.num_rounds else set())


def _upload_bytes(config: Config) -> tuple[Callable[[Layout], int], int]:
    """Return what gives the bytes of an upload, with the exchanges of keys where it is masked, and the bytes of these that come down."""
    federation, dtype = config.federation, config.federation.wire_dtype
    if not federation.secure_sum:
        return lambda layout: layout_bytes(layout, dtype), 0
    size = cohort_size(federation.num_clients, federation.fraction)
    return lambda layout: bytes_up(layout.numel, size), bytes_down(size)


def _run_bytes(config: Config, layouts_of: LayoutsOf, basis: State, growth: Growth) -> tuple[int, int, int]:
    """Walk through the schedule and return bytes up, down and one-off over all clients, the start's exchanges aside.

    All clients evaluate after the last round, and after others the cohort.
    """
    federation, names, log = config.federation, client_names(config), FrozenLog()
    size, dtype = cohort_size(len(names), federation.fraction), federation.wire_dtype
    up_bytes, beside = _upload_bytes(config)
    held: dict[str, int] = {}
    up = down = one_off = 0
    log.extend(basis, "start")
    due = _evaluating(config)
    for number in range(1, federation.num_rounds + 1) or (0,):
        cohort = draw_cohort(names, size, seed=config.seed, round_number=number)
        for evaluating in (*((False,) if number else ()), *((True,) if number in due else ())):
            if evaluating and number:
                log.extend(growth(number, cohort), str(number))
            for client in names if evaluating and number == federation.num_rounds else cohort:
                own = layouts_of(client)
                bundle = log.bundle(held.get(client, 0), own.sight)
                lacked, once = (bundle.state.numel, bundle.one_off) if bundle else (0, 0)
                down += layout_bytes(own.down, dtype) + float32_bytes(lacked - once)
                down += 0 if evaluating else layout_bytes(own.asked, dtype) + beside
                one_off += float32_bytes(once)
                up += 0 if evaluating else up_bytes(own.up_in(number)) + layout_bytes(own.told, dtype)
                held[client] = log.version
        if number and number not in due:
            log.extend(growth(number, cohort), str(number))
    return up, down, one_off
