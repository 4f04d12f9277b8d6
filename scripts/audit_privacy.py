"""Audit the client's private training: a lower bound on epsilon from what a server can guess, beside the epsilon that is claimed.

Run as ``python scripts/audit_privacy.py [--quick]``: less than 3 minutes of CPU, quick less than one. What is run is
``clients.private.private_fit`` on a tiny BERT with Fed-SB's adapters and a head. Of 64 canaries each is in or out by a fair coin; the
server, which knows the canaries, the model and the state that it sent, scores them on the state that comes back and guesses. Runs
repeat with new coins, noise and samples. The columns, each with its part of the confidence of the row:

- ``lower bound``: holds for any mechanism, needs no independence (``audit_bounds.any_mechanism``). The verdict rests on it.
- ``if Gaussian``: for one step on all examples, whose claim is that of a Gaussian mechanism. Takes the scores of a run as independent:
  their noise is, as orthogonal projections; what is left of other canaries in a score is not, and blurs it. The real code must not
  exceed its claim by this bound either.

The real code passes with a bound of at least a fifth of the claim and not above it; code that is broken on purpose must be caught: its
bound exceeds the claim. A row's confidence is its own: of many rows with tight bounds a share of one minus it would fail by chance.
Exit status 1 if a verdict fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from audit_bounds import any_mechanism, gaussian
from audit_subject import CANARIES, FAULTS, Subject, experiment, subject

from fedsb.privacy.accounting import Entry, calibrate, epsilon_of

EPSILON, DELTA = 4.0, 1e-5
RUNS, QUICK_RUNS = 640, 64
# The least share of the claim that a bound must reach to say something.
TELLING = 0.2
# One run in so many only finds the threshold of the Gaussian bound.
PILOT = 4


@dataclass(frozen=True)
class Case:
    """What is audited: releases of one kind, by the real code or with a fault."""

    name: str
    entry: Entry
    fault: str | None = None


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: of the case.
        entry: what the ledger would hold.
        claim: epsilon that the accountant gives for it.
        bound: what epsilon exceeds, whatever the mechanism.
        gaussian: what it exceeds if the mechanism is Gaussian; None where that cannot be.
        confidence: with which both hold.
        broken: whether the case is to be caught.
        canaries: trials, over all runs.
        seconds: CPU time.
    """

    name: str
    entry: Entry
    claim: float
    bound: float
    gaussian: float | None
    confidence: float
    broken: bool
    canaries: int
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether the real code keeps its claim and the bound says something, or the broken code is caught."""
        if self.broken:
            return self.bound > self.claim
        return TELLING * self.claim <= self.bound <= self.claim and (self.gaussian or 0.0) <= self.claim

    @property
    def verdict(self) -> str:
        """In words."""
        if self.broken:
            return "PASS caught" if self.holds else "FAIL not caught"
        if self.holds:
            return "PASS within the claim"
        return "FAIL says too little" if self.bound < TELLING * self.claim else "FAIL exceeds the claim"


def main() -> int:
    """Audit all cases and print the table."""
    options = parse()
    torch.set_num_threads(1)
    audited, runs = subject(options.seed), QUICK_RUNS if options.quick else RUNS
    rows = [audit(audited, case, runs=runs, seed=options.seed, confidence=options.confidence) for case in cases()]
    show(rows)
    if options.out:
        made = {"delta": DELTA, "seed": options.seed, "canaries": CANARIES, "rows": [{**asdict(r), "verdict": r.verdict} for r in rows]}
        options.out.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row.holds for row in rows) else 1


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_RUNS} runs a case instead of {RUNS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--confidence", type=float, default=0.99, help="of each row; 0.99")
    parser.add_argument("--out", type=Path, metavar="PATH", help="write the table as JSON")
    options = parser.parse_args()
    if not 0 < options.confidence < 1:
        parser.error(f"--confidence {options.confidence}: it must lie between 0 and 1")
    return options


def cases() -> Iterator[Case]:
    """Give what is audited, with the noise that the project would give it for :data:`EPSILON`."""
    step = Entry("gaussian", 1.0, calibrate(EPSILON, DELTA, ((1.0, 1),)), 1)
    sampled = Entry("gaussian", 0.5, calibrate(EPSILON, DELTA, ((0.5, 4),)), 4)
    yield Case("real, one step on all examples", step)
    yield Case("real, four Poisson samples of a half", sampled)
    yield from (Case(fault, step, fault) for fault in FAULTS)


def audit(audited: Subject, case: Case, *, runs: int, seed: int, confidence: float) -> Row:
    """Run a case and bound its epsilon."""
    begun, alpha = time.process_time(), 1.0 - confidence
    scores, bits = experiment(audited, case.entry, case.fault, runs=runs, seed=seed, tell=progress(case.name, runs))
    whole = case.entry.sampling_rate == 1.0
    bound = any_mechanism(scores.ravel(), bits.ravel(), delta=DELTA, alpha=alpha / 2 if whole else alpha)
    tight = None
    if whole:
        pilot = runs // PILOT
        judged, coins = scores[pilot:].ravel(), bits[pilot:].ravel()
        tight = gaussian(judged, coins, float(scores[:pilot].mean()), delta=DELTA, alpha=alpha / 2)
    claim, broken = epsilon_of([case.entry], DELTA), case.fault is not None
    return Row(case.name, case.entry, claim, bound, tight, confidence, broken, bits.size, time.process_time() - begun)


def progress(name: str, runs: int) -> Callable[[int], None]:
    """Return what tells how far a case is, ten times."""

    def tell(done: int) -> None:
        if done == runs or done % max(1, runs // 10) == 0:
            print(f"\r{name}: {done}/{runs} runs", end="\n" if done == runs else "", file=sys.stderr, flush=True)

    return tell


def show(rows: list[Row]) -> None:
    """Print the table."""
    print(f"\n{'case':<38}{'claim':>7}{'lower bound':>13}{'if Gaussian':>13}{'confidence':>12}{'canaries':>10}{'CPU s':>7}  verdict")
    for row in rows:
        tight = "–" if row.gaussian is None else f"{row.gaussian:.2f}"
        numbers = f"{row.claim:>7.2f}{row.bound:>13.2f}{tight:>13}{row.confidence:>12.0%}{row.canaries:>10}{row.seconds:>7.1f}"
        print(f"{row.name:<38}{numbers}  {row.verdict}")
    print(f"epsilon at delta={DELTA:g}; every lower bound with the row's confidence, corrected for the looks that were taken")


if __name__ == "__main__":
    sys.exit(main())
