"""One federation over each wire: its gap, its bytes, and how far it ends from where it ends in float32.

``python scripts/bench/coarse_wires.py experiment=quick method=fedavg_lora federation.num_rounds=3``; the overrides are any run's, of a
method that adds nothing to frozen weights. The distance is that of the weights' changes, head included, over what the run in float32 has
moved.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from fedsb.adapters.low_rank import Term, low_rank_squared_norm
from fedsb.app.prepare import Prepared, prepare
from fedsb.config.compose import load
from fedsb.core.state import HEAD, Name, State, squared_norm, subtract
from fedsb.report.markdown import table
from fedsb.run.checkpoint import load_checkpoint
from fedsb.run.folder import read_run
from fedsb.runtime.grids import grid_for
from fedsb.server_app import serve

WIRES = {
    "float32": ("federation.wire_dtype=float32",),
    "bfloat16": ("federation.wire_dtype=bfloat16",),
    "int8, no feedback": ("federation.wire_dtype=int8", "federation.error_feedback=false"),
    "int8": ("federation.wire_dtype=int8",),
}


@dataclass(frozen=True)
class Ended:
    """How a run ended: all factors and the head that clients hold, the gaps of its rounds, its metrics and bytes."""

    held: State
    gaps: tuple[float, ...]
    metrics: Mapping[str, float]
    payload: tuple[int, int]


def ended(overrides: list[str], folder: Path) -> Ended:
    """Run a federation."""
    config = load(overrides)
    summary = serve(config, grid_for(config, {"overrides": shlex.join(overrides), "output": str(folder)}), folder)
    last = load_checkpoint(folder / "checkpoints")
    records = read_run(folder).records
    gaps = tuple(record.exactness_gap or 0.0 for record in records[1:])
    held = last.frozen.view().basis.merge(last.state)
    return Ended(held, gaps, records[-1].metrics, (summary["payload_up"], summary["payload_down"]))


def apart(one: State, other: State, prepared: Prepared) -> float:
    """Return ``‖ΔW − ΔW'‖_F`` over all modules and the head."""
    adapted = prepared.adapted

    def term(state: State, module: str, scale: float) -> Term:
        left, right = adapted.spec.split(tuple(state[Name(module, role)].double() for role in adapted.spec.factors))
        return scale * left, right

    terms = [[term(one, module, adapted.scale), term(other, module, -adapted.scale)] for module in adapted.shapes]
    return float((sum(map(low_rank_squared_norm, terms)) + squared_norm(subtract(one.pick(HEAD), other.pick(HEAD)))) ** 0.5)


def main(overrides: list[str]) -> None:
    """Run all wires and print a table."""
    prepared = prepare(load(overrides))
    start = prepared.strategy.frozen.view().basis.merge(prepared.initial)
    with TemporaryDirectory() as folder:
        runs = {wire: ended([*overrides, *more, "plots=false"], Path(folder) / wire) for wire, more in WIRES.items()}
    fine = runs["float32"].held
    moved = apart(fine, start, prepared)
    rows = [
        [
            wire,
            *(f"{max(run.gaps):.1e}", f"{apart(run.held, fine, prepared) / moved:.1e}"),
            ", ".join(f"{key} {value:.4f}" for key, value in run.metrics.items()),
            *(f"{count:,}" for count in run.payload),
        ]
        for wire, run in runs.items()
    ]
    print(table(("wire", "gap at most", "apart", "metrics", "bytes up", "bytes down"), rows))


if __name__ == "__main__":
    main(sys.argv[1:])
