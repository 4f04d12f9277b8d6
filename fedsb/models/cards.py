"""Which layers of a network lie on which GPU: in their order, so that a pass goes from one GPU to the next once each way."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedsb.core.errors import UserError

MOST = 0.85  # of a GPU's free memory, for what a model holds between passes
HALVINGS = 40


def cards_from(device: str) -> list[torch.device]:
    """Return the GPUs that a base may be spread over: all that the process sees; of ``cuda:k`` the k-th and those behind it."""
    first = int(device.partition(":")[2] or 0)
    return [torch.device("cuda", i) for i in range(first, max(first + 1, torch.cuda.device_count()))]


def free_on(cards: Sequence[torch.device]) -> list[int]:
    """Return the bytes that are free on each GPU."""
    # What a model before this one has left counts as taken until torch lets go of it.
    torch.cuda.empty_cache()
    return [torch.cuda.mem_get_info(card)[0] for card in cards]


def cut(layers: Sequence[int], first: int, rooms: Sequence[int]) -> list[int]:
    """Return the number of the GPU for each layer; it never falls from one layer to the next.

    All go to the first GPU where no more than :data:`MOST` of it is taken then. Elsewhere the layers are cut so that the fullest GPU, by
    the share of its memory that is taken, is as empty as can be: activations find room on each.

    Args:
        layers: bytes of each, in the order in which they compute.
        first: bytes of all else, which lies on the first GPU.
        rooms: free bytes of each GPU.

    Raises:
        UserError: they do not fit.
    """
    if first + sum(layers) <= MOST * rooms[0]:
        return [0] * len(layers)
    found, low, high = _filled(layers, first, rooms, MOST), 0.0, MOST
    if found is None:
        raise UserError(_too_large(layers, first, rooms))
    for _ in range(HALVINGS):
        share = (low + high) / 2
        closer = _filled(layers, first, rooms, share)
        low, high, found = (share, high, found) if closer is None else (low, share, closer)
    return found


def _filled(layers: Sequence[int], first: int, rooms: Sequence[int], share: float) -> list[int] | None:
    """Fill a share of each GPU, one after the other; None where that is not enough."""
    found: list[int] = []
    card, held = 0, first
    if held > share * rooms[0]:
        return None
    for size in layers:
        while held + size > share * rooms[card]:
            card, held = card + 1, 0
            if card == len(rooms):
                return None
        held += size
        found.append(card)
    return found


def _too_large(layers: Sequence[int], first: int, rooms: Sequence[int]) -> str:
    gib = [f"{size / 2**30:.1f}" for size in (first + sum(layers), first, *rooms)]
    return (
        f"model.device_map=auto: the model takes {gib[0]} GiB, {gib[1]} of them on the first GPU and the rest in {len(layers)} layers, and "
        f"of what is free on each GPU here ({', '.join(gib[2:])} GiB) {MOST:.0%} can be taken; use model.dtype=bfloat16 or "
        "model.quantize=int4, or give the process more GPUs (runtime.gpus on Ray)"
    )
