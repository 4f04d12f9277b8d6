"""Which cards (GPUs) Ray's workers and their driver compute on: a worker has one of its own, and the driver none that a worker has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedsb.core.errors import UserError


@dataclass(frozen=True)
class Seat:
    """A memory, and how many workers share it.

    Attributes:
        device: whose memory it is; cards are taken to be alike.
        workers: that compute there at a time.
    """

    device: str
    workers: int


@dataclass(frozen=True)
class Placement:
    """Where workers and driver compute.

    Attributes:
        share: of a card that each worker reserves; at 0 it sees no card.
        driver: the driver's device.
        cards: that Ray may hand out on this machine; None: all that it finds.
    """

    share: float
    driver: str
    cards: int | None = None

    def remark(self, size: int) -> str:
        """Say in a line where workers and server compute; nothing where no card is in play."""
        if not self.share and not self.driver.startswith("cuda"):
            return ""
        each = f"with {self.share:g} of a GPU each" if self.share else "on CPUs"
        return f"{size} worker{'s' if size > 1 else ''} {each}; the server computes on {self.driver}"

    def seat(self, size: int, *, own: bool) -> Seat:
        """Return the memory that one of ``size`` workers shares; of a cluster nobody knows here how many are on a machine."""
        if not own:
            return Seat("cpu", 1)
        if not self.share:
            return Seat("cpu", size)
        return Seat("cuda:0", min(size, max(1, most_workers(self.share, 1.0))))


def place(device: str, share: float | None, workers: int | None, cards: int, *, own: bool) -> Placement:
    """Lay out a pool.

    Args:
        device: as configured: ``auto``, ``cpu`` or ``cuda``.
        share: of a card, as asked for; None follows the cards: one a worker, where there are any to be used.
        workers: as asked for; None takes as many as fit.
        cards: that there are, on this machine or in the cluster.
        own: whether Ray is started for this pool on this machine. Of a cluster nobody knows here which card is free.
    """
    usable = cards if device != "cpu" else 0
    each = share if share is not None else float(usable > 0)
    taken = _taken(each, workers, usable)
    if own and taken < usable:
        # Ray hands out the first ones, and is not told of the spare one.
        return Placement(each, f"cuda:{taken}", taken)
    return Placement(each, "cpu" if device == "auto" else device, usable if own and usable else None)


def most_workers(share: float, cards: float) -> int:
    """Return how many workers fit on cards, none of which is split between two: shares of one card count to that card alone."""
    return int(cards) * int(1 / share + 1e-9) if share < 1 else int(cards / share + 1e-9)


def fitting(workers: int | None, cpus: float, share: float, held: Mapping[str, float]) -> int:
    """Return the number of workers, held against what the cluster has; at least one, and as many as fit where none are asked for.

    Args:
        workers: as asked for.
        cpus: that each one reserves.
        share: of a card, likewise.
        held: the cluster's resources, as Ray names them.

    Raises:
        UserError: it cannot hold so many, or not one.
    """
    fits = {"CPU": int(held.get("CPU", 0.0) / cpus + 1e-9)} if cpus else {}
    fits |= {"GPU": most_workers(share, held.get("GPU", 0.0))} if share else {}
    most = min(fits.values(), default=1)
    wanted = workers or max(1, most)
    if wanted > most:
        has = ", ".join(f"{held.get(kind, 0.0):g} {kind}s" for kind in fits)
        needs = {"CPU": cpus, "GPU": share}
        each = ", ".join(f"runtime.{kind.lower()}s={needs[kind]:g}" for kind in fits)
        raise UserError(f"{wanted} workers with {each} each do not fit ({has}); lower runtime.workers, or the share of each")
    return wanted


def _taken(share: float, workers: int | None, cards: int) -> int:
    if not share:
        return 0
    if workers is None:
        return cards
    a_card = most_workers(share, 1.0)
    return min(cards, -(-workers // a_card) if share < 1 else int(workers * share))
