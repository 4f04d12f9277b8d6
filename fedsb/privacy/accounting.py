"""Epsilon of a list of noisy releases, and the noise that a target epsilon asks for.

The numbers come from maintained accountants, never from formulas of this project: Opacus' PRV (Gopi et al., arXiv 2106.02848) and RDP
(Mironov et al., arXiv 1908.10530), and the PLD of Google's ``dp-accounting`` (Doroshenko et al., arXiv 2207.04380). All three return
upper bounds. Neighbouring data sets differ in one example, added, removed or zeroed out; its number of examples is public.

Noise multipliers are the noise's standard deviation over the clipping bound of one example, with no unit.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

from fedsb.core.errors import UserError, unknown
from fedsb.privacy.entries import MOST_STEPS, Entry

__all__ = ["ACCOUNTANTS", "Entry", "calibrate", "epsilon_of"]
# RDP's orders; Opacus' binomials overflow above 1029. Its series for orders between the integers needs millions of terms at a sampling
# rate near a half: there the whole orders have to do, which costs up to 2 percent where epsilon is below 30.
WHOLE_ORDERS = (*range(2, 64), 72, 80, 96, 128, 192, 256, 384, 512, 768, 1000)
BROKEN_ORDERS = (1.005, 1.01, 1.02, 1.05, *(1 + i / 10 for i in range(1, 20) if i != 10), *(i + 0.5 for i in range(3, 11)))
ROUGH_ORDERS = (1.1, 1.3, 1.6, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256)
SLOW_RATES = (0.46, 0.54)
# The privacy loss up to which PRV and PLD are asked: beyond it exp leaves float64, and meshes the memory.
LARGEST_LOSS = 600.0
# PRV: its stated error relative to the RDP bound, and as many mesh points as fit a second.
PRV_ERROR = 0.003
PRV_POINTS = 2**20
# PLD: the mesh relative to the RDP bound, and the steps beyond which it takes minutes.
PLD_MESH = 2e-4
PLD_STEPS = 10**6
# Bounds within which a noise multiplier is sought, and how closely: relative, in the noise and in epsilon.
SMALLEST_NOISE, LARGEST_NOISE = 1e-2, 1e4
NOISE_TOLERANCE = 0.005
EPSILON_TOLERANCE = 0.008


def epsilon_of(entries: Sequence[Entry], delta: float, accountant: str = "prv") -> float:
    """Return an upper bound of the epsilon at ``delta`` of all entries together, whatever their order.

    0 where nothing was released, infinity where something was released without noise, or where no accountant finds a bound. No list of
    entries makes it fail.

    Args:
        entries: all releases that one example took part in.
        delta: in (0, 1).
        accountant: a name in :data:`ACCOUNTANTS`.

    Raises:
        ValueError: delta is outside its range.
        UserError: there is no such accountant.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}; it must lie in (0, 1)")
    if accountant not in ACCOUNTANTS:
        raise unknown("accountant", accountant, ACCOUNTANTS)
    released = [entry for entry in entries if entry.steps]
    if any(entry.noise_multiplier == 0 for entry in released) or sum(entry.steps for entry in released) > MOST_STEPS:
        return math.inf
    return _computed(_merged(released), delta, accountant) if released else 0.0


@lru_cache(maxsize=1024)
def _computed(merged: tuple[Entry, ...], delta: float, accountant: str) -> float:
    # Clients of one size have one account between them, and a PRV takes half a second.
    for name in dict.fromkeys((accountant, "rdp")):
        with suppress(ArithmeticError, ValueError, RuntimeError, MemoryError):
            epsilon = ACCOUNTANTS[name](merged, delta)
            if not math.isnan(epsilon):
                return max(0.0, epsilon)
    return math.inf


def calibrate(
    target: float, delta: float, releases: Sequence[tuple[float, int]], *, before: Sequence[Entry] = (), accountant: str = "prv"
) -> float:
    """Return the smallest noise multiplier with which ``releases`` keep epsilon, together with ``before``, at or below ``target``.

    It is the smallest to half a percent, and epsilon to one percent of the target, never above. Equal arguments are computed once in
    a process. No multiplier below 0.01 is returned.

    Args:
        target: epsilon, positive and finite.
        delta: in (0, 1).
        releases: sampling rate and number of steps of each; all get the same noise multiplier.
        before: what was released already.
        accountant: a name in :data:`ACCOUNTANTS`.

    Raises:
        ValueError: the target or delta is outside its range, or there is nothing to release.
        UserError: not even a noise multiplier of 10000 reaches the target.
    """
    if not 0 < target < math.inf:
        raise ValueError(f"epsilon is {target}; it must be positive and finite")
    if not any(steps for _, steps in releases):
        raise ValueError("there is nothing to release: no noise multiplier to find")
    return _calibrated(target, delta, tuple((q, steps) for q, steps in releases), _merged(before), accountant)


@lru_cache(maxsize=256)
def _calibrated(target: float, delta: float, releases: tuple[tuple[float, int], ...], before: tuple[Entry, ...], accountant: str) -> float:
    def excess(name: str) -> Callable[[float], float]:
        def of(log_noise: float) -> float:
            new = [Entry("gaussian", q, math.exp(log_noise), steps) for q, steps in releases]
            epsilon = epsilon_of([*before, *new], delta, name)
            return math.log(min(max(epsilon / target, 1e-9), 1e9))

        return of

    # RDP's bound costs a fraction of PRV's and lies a little above it: it says where to begin.
    start = _root(excess("rdp"), 0.0)
    found = start if accountant == "rdp" else _root(excess(accountant), math.log(LARGEST_NOISE) if start is None else start)
    if found is None:
        spent = f", as {epsilon_of(before, delta, accountant):.4g} was spent before" if before else ""
        raise UserError(
            f"privacy.epsilon={target:g} cannot be reached at delta={delta:g} with any noise multiplier up to {LARGEST_NOISE:g}{spent}; "
            "raise privacy.epsilon, or release less: fewer rounds, steps or examples a batch"
        )
    return math.exp(found)


def _root(excess: Callable[[float], float], start: float) -> float | None:
    """Return where a falling function is at most 0 but only just, or None where it is above 0 up to the end."""
    bracket = _bracket(excess, start)
    if bracket is None:
        return None
    (low, above), (high, below) = bracket
    # A jump of an accountant (where it changes its method) may lie above the tolerance in epsilon: then the noise decides.
    while high - low > NOISE_TOLERANCE or (below < -EPSILON_TOLERANCE and high - low > 1e-6):
        margin = min(0.8 * NOISE_TOLERANCE, (high - low) / 4)
        aim = low + (high - low) * (above + NOISE_TOLERANCE / 4) / (above - below)
        at = min(max(aim, low + margin), high - margin)
        value = excess(at)
        (low, above), (high, below) = ((at, value), (high, below)) if value > 0 else ((low, above), (at, value))
    return high


def _bracket(excess: Callable[[float], float], start: float) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Return a point where the function is above 0 and one where it is not, by steps that double."""
    lowest, highest = math.log(SMALLEST_NOISE), math.log(LARGEST_NOISE)
    last = (start, excess(start))
    step = max(abs(last[1]), 2 * NOISE_TOLERANCE)
    while True:
        rising = last[1] > 0
        if last[0] == (highest if rising else lowest):
            return None if rising else (last, last)
        at = min(max(last[0] + (step if rising else -step), lowest), highest)
        here = (at, excess(at))
        if (here[1] > 0) != rising:
            return (last, here) if rising else (here, last)
        last, step = here, 2 * step


def _merged(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Sum up the steps of equal mechanisms, in one order whatever that of the entries.

    More noise than is ever sought counts as that: it costs next to nothing, and PRV has minutes of work with it.
    """
    steps: dict[tuple[str, float, float], int] = {}
    for entry in entries:
        kind = (entry.mechanism, entry.sampling_rate, min(entry.noise_multiplier, LARGEST_NOISE))
        steps[kind] = steps.get(kind, 0) + entry.steps
    return tuple(Entry(*kind, count) for kind, count in sorted(steps.items()) if count)


@contextmanager
def _quiet() -> Iterator[None]:
    # Opacus warns of the orders that it picks itself, and divides by 0 where nothing is sampled, on the way to a right result.
    import numpy as np

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


def _opacus(kind: str, entries: Sequence[Entry]) -> Any:
    # Imported here: it takes seconds, and most processes of a federation never account.
    from opacus.accountants import create_accountant

    accountant = create_accountant(kind)
    accountant.history = [(entry.noise_multiplier, entry.sampling_rate, entry.steps) for entry in entries]
    return accountant


def _rdp(entries: Sequence[Entry], delta: float, orders: Sequence[float] = (*BROKEN_ORDERS, *WHOLE_ORDERS)) -> float:
    low, high = SLOW_RATES
    slow = any(low < entry.sampling_rate < high for entry in entries)
    used = sorted(order for order in orders if not slow or order == int(order))
    with _quiet():
        return float(_opacus("rdp", entries).get_epsilon(delta, alphas=used))


def _prv(entries: Sequence[Entry], delta: float) -> float:
    """The bound of PRV, its stated error included; that of RDP where the privacy loss leaves float64 (epsilon of some hundreds)."""
    bound, reach = _rdp(entries, delta, ROUGH_ORDERS), _rdp(entries, delta / 4000, ROUGH_ORDERS)
    if not reach < LARGEST_LOSS:
        return _rdp(entries, delta)
    # The mesh is as fine as the error asks for; what would take more points than fit gets a larger error.
    finest = 2 * (reach + 3) * math.sqrt(sum(entry.steps for entry in entries) * math.log(12000 / delta) / 2) / PRV_POINTS
    with _quiet():
        return float(_opacus("prv", entries).get_epsilon(delta, eps_error=max(PRV_ERROR * bound, finest)))


def _pld(entries: Sequence[Entry], delta: float) -> float:
    """The bound of PLD; that of RDP beyond :data:`LARGEST_LOSS` or :data:`PLD_STEPS`."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    if sum(entry.steps for entry in entries) > PLD_STEPS or not _rdp(entries, delta / 4000, ROUGH_ORDERS) < LARGEST_LOSS:
        return _rdp(entries, delta)
    # A mesh for the epsilon at hand: the default takes gigabytes for a large one, and is coarse for a small one.
    mesh = min(max(PLD_MESH * _rdp(entries, delta, ROUGH_ORDERS), 1e-6), 1e-2)
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL, value_discretization_interval=mesh)
    with _quiet():
        for entry in entries:
            noise = dp_accounting.GaussianDpEvent(entry.noise_multiplier)
            whole = entry.sampling_rate == 1
            accountant.compose(noise if whole else dp_accounting.PoissonSampledDpEvent(entry.sampling_rate, noise), entry.steps)
        return float(accountant.get_epsilon(delta))


ACCOUNTANTS: dict[str, Callable[[Sequence[Entry], float], float]] = {"prv": _prv, "rdp": _rdp, "pld": _pld}
