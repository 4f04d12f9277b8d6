"""A state of which the leading components were sent, as its receiver holds it."""

from __future__ import annotations

from fedsb.adapters.redrawn import Redrawn, shortened
from fedsb.core.state import Layout, State
from fedsb.wire.arrays import LayoutError
from fedsb.wire.messages import Instruction


def received(instruction: Instruction, own: Layout, whole: Layout, seed: int) -> State:
    """Return the state of an instruction, with what was left to be drawn.

    Args:
        instruction: as it came.
        own: what the client is to hold.
        whole: what the server holds.
        seed: of the run.

    Raises:
        LayoutError: the sender's layout is another one.
    """
    if not instruction.ranks:
        return instruction.state(own)
    rows = {name.module: shape for name, shape in whole.shapes if name.role == "A"}
    if len(rows) != len(instruction.ranks) or min(instruction.ranks) < 1:
        raise LayoutError(f"ranks {list(instruction.ranks)[:8]} were sent for {len(rows)} modules")
    short = shortened(own, dict(zip(sorted(rows), instruction.ranks, strict=True)))
    return Redrawn(seed, instruction.made_in).completed(instruction.state(short), rows, own)
