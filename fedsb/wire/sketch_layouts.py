"""What server and clients must agree on for the exchanges of a gradient start: the sketch and the layouts on the wire."""

from __future__ import annotations

from collections.abc import Mapping

from fedsb.adapters.starts import Sketch
from fedsb.config.schema import InitConfig
from fedsb.core.state import Layout, Name

# Exchange -> (role and side of what the server sends, role and side of what clients answer); side 0 is m, 1 is n.
WIRE: dict[str, tuple[tuple[str, int], tuple[str, int]]] = {
    "range": (("P", 1), ("Y", 0)),
    "corange": (("Q", 0), ("Z", 1)),
    "core": (("Q", 0), ("Z", 1)),
}


def sketch_of(init: InitConfig, rank: int, seed: int) -> Sketch:
    """Return the sketch that a configuration asks for."""
    return Sketch(rank=rank, oversample=init.oversample, power_iterations=init.power_iterations, seed=seed)


def probe_layout(sketch: Sketch, shapes: Mapping[str, tuple[int, int]], stage: str, *, first: bool) -> Layout:
    """Return the layout of what the server sends with a stage; the first probe is drawn by the clients and costs nothing."""
    return Layout(()) if first else _layout(sketch, shapes, *WIRE[stage][0])


def reply_layout(sketch: Sketch, shapes: Mapping[str, tuple[int, int]], stage: str) -> Layout:
    """Return the layout of what clients send in a stage: ``Y`` (m, l) or ``Z`` (n, l)."""
    return _layout(sketch, shapes, *WIRE[stage][1])


def _layout(sketch: Sketch, shapes: Mapping[str, tuple[int, int]], role: str, side: int) -> Layout:
    return Layout(tuple(sorted((Name(module, role), (shape[side], sketch.width(*shape))) for module, shape in shapes.items())))
