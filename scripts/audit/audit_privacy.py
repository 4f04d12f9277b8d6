"""Audit what is private: hold the noise, the samples and the sensitivity of the real code, and attacks on it, against what is claimed.

Run as ``python scripts/audit/audit_privacy.py [--quick]``. Each row runs the project's own code on a tiny model whose every canary is in or
out by a coin that the adversary does not know, with noise for epsilon 4, and looks at:

- the noise of releases without any canary: the size of each tensor's and of each release's, its shape, and that steps, rounds, tensors
  and clients share none (exact tests, two-sided);
- the samples as they were computed on: how many are drawn, who, and who with whom and when (exact tests);
- the sensitivity: what zeroing out one example moves a release by, noise and samples being the same, over C;
- guesses (``any``, for whatever mechanism; ``Gaussian``, much tighter, for one step on all examples): of an adversary who looks at all
  tensors alike, of one who knows each tensor's noise from runs without canaries, and of one for each tensor alone.

``of its parts`` is the accountant's epsilon for the largest noise that the least noised tensor may have and for the sensitivity measured.

The real code passes where nothing refutes the claim, and where the measurement says enough (a sensitivity of at least 0.9 C somewhere, a
bound of at least a fifth of the claim where one release is made of all examples). Each planted fault must be refuted in each of its rows,
in each of its forms. The confidence is that of the whole table: code that keeps its claim fails with a probability of at most one minus
it. Exit status 1 if a verdict fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from evaluations import evaluation_rows
from faults import Fault, faults
from others import other_rows
from parts import Found, examine
from rows import DELTA, EPSILON, Row, training_rows
from subject import subject
from texts import text_rows

# Runs without canaries and with them; of a fault as many without as quick ones, and a few with.
SILENT, RUNS = 160, 640
QUICK_SILENT, QUICK_RUNS = 24, 64
FAULT_SILENT, FAULT_RUNS = 8, 32
# The least share of the claim that a bound must reach to say something, and the least sensitivity over C.
TELLING, MOVED = 0.2, 0.9


@dataclass(frozen=True)
class Line:
    """A line of the first table: the real code."""

    row: str
    covers: str
    found: Found
    told: bool
    seconds: float

    @property
    def verdict(self) -> str:
        """In words."""
        if self.found.refuted:
            return f"FAIL: {', '.join(self.found.refuted)}"
        return "PASS within the claim" if self.told else "FAIL says too little"


@dataclass(frozen=True)
class Caught:
    """A line of the second table: a fault in a row, and what refuted each of its forms."""

    fault: str
    row: str
    by: tuple[tuple[str, ...], ...]
    seconds: float

    @property
    def verdict(self) -> str:
        """In words."""
        missed = sum(not names for names in self.by)
        return f"FAIL: {missed} of {len(self.by)} not caught" if missed else "PASS caught"


def main() -> int:
    """Audit all rows, plant all faults, and print both tables."""
    options = parse()
    torch.set_num_threads(1)
    tiny = subject(options.seed)
    rows: list[Row] = [*training_rows(tiny), *other_rows(tiny), *evaluation_rows(tiny), *text_rows(options.seed)]
    alpha, chosen = (1.0 - options.confidence) / len(rows), [row for row in rows if any(text in row.name for text in options.only)]
    silent, runs = (QUICK_SILENT, QUICK_RUNS) if options.quick else (SILENT, RUNS)
    lines = [real(row, silent, runs, options.seed, alpha) for row in chosen]
    show(lines)
    pairs = [] if options.no_faults else [(fault, row) for fault in faults(rows) for row in chosen if row.name in fault.rows]
    planted = [broken(fault, row, options.seed, alpha) for fault, row in pairs]
    show_faults(planted)
    print(f"delta = {DELTA:g}; confidence of the whole table {options.confidence:.0%}; {time.process_time():.0f} s of CPU")
    if options.out:
        options.out.write_text(json.dumps(record(lines, planted), indent=2) + "\n", encoding="utf-8")
    verdicts = [*(line.verdict for line in lines), *(line.verdict for line in planted)]
    return 0 if all(verdict.startswith("PASS") for verdict in verdicts) else 1


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_RUNS} runs with canaries a row instead of {RUNS}")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="rows whose name contains one of these")
    parser.add_argument("--no-faults", action="store_true", help="plant none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--confidence", type=float, default=0.99, help="of the whole table; 0.99")
    parser.add_argument("--out", type=Path, metavar="PATH", help="write the tables as JSON")
    options = parser.parse_args()
    if not 0 < options.confidence < 1:
        parser.error(f"--confidence {options.confidence}: it must lie between 0 and 1")
    return options


def real(row: Row, silent: int, runs: int, seed: int, alpha: float) -> Line:
    """Examine the real code."""
    begun = time.process_time()
    runs = runs if row.attacked or row.count_noise is not None else 0
    found = examine(row, silent=some(row, silent), runs=runs, seed=seed, alpha=alpha)
    whole = row.attacked and row.entry.sampling_rate == 1.0
    certified = max(found.bound or 0.0, found.gaussian or 0.0)
    enough = found.sensitivity >= (MOVED if row.reaches else 0.0) and (not whole or certified >= TELLING * found.claim)
    seconds = time.process_time() - begun
    print(f"{row.name}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return Line(row.name, row.covers, found, enough, seconds)


def broken(fault: Fault, row: Row, seed: int, alpha: float) -> Caught:
    """Plant each form of a fault and examine the row."""
    begun, by = time.process_time(), []
    for plant in fault.plants:
        with plant(row):
            attempt = replace(row, checked=False)  # type: ignore[type-var]
            whole = row.entry.sampling_rate == 1.0 and row.attacked
            runs = FAULT_RUNS if (whole and len(fault.plants) == 1) or row.count_noise is not None else 0
            found = examine(attempt, silent=some(row, FAULT_SILENT), runs=runs, seed=seed, alpha=alpha, brief=True)
        by.append(tuple(found.refuted))
    print(f"{fault.name}, {row.name}: {time.process_time() - begun:.1f} s", file=sys.stderr, flush=True)
    return Caught(fault.name, row.name, tuple(by), time.process_time() - begun)


def some(row: Row, silent: int) -> int:
    """Return how many runs without canaries a row makes: those with long texts are slow, and have many tensors."""
    return silent if row.neighbours is None else silent // 4


def show(lines: Sequence[Line]) -> None:
    """Print the first table: rows, and what each covers."""
    heads = f"{'claim':>6}{'any':>6}{'Gaussian':>10}{'of its parts':>14}{'moved/C':>9}{'tests':>7}{'least p':>9}{'CPU s':>7}"
    print(f"\n{'real code':<28}{heads}  verdict")
    for line in lines:
        found = line.found
        bounds = f"{found.claim:>6.2f}{number(found.bound):>6}{number(found.gaussian):>10}{found.parts:>14.2f}"
        tests = f"{found.sensitivity:>9.4f}{len(found.p_values):>7}{found.least:>9.2g}{line.seconds:>7.0f}"
        print(f"{line.row:<28}{bounds}{tests}  {line.verdict}")
    print(f"\nepsilon {EPSILON:g} was asked for; 'least p' is corrected for the row's tests. What the rows cover:")
    for line in lines:
        print(f"  {line.row:<28}{line.covers}")


def show_faults(planted: Sequence[Caught]) -> None:
    """Print the second table."""
    if planted:
        print(f"\n{'fault':<50}{'row':<28}{'forms':>6}  {'verdict':<14}by")
    for line in planted:
        first, *more = line.by[0] or ("–",)
        print(f"{line.fault:<50}{line.row:<28}{len(line.by):>6}  {line.verdict:<14}{first}{f' and {len(more)} more' if more else ''}")


def number(value: float | None) -> str:
    """Return a bound in short."""
    return "–" if value is None else f"{value:.2f}"


def record(lines: Sequence[Line], planted: Sequence[Caught]) -> dict[str, object]:
    """Return both tables for JSON."""
    return {
        "delta": DELTA,
        "rows": [{**asdict(line), "refuted": line.found.refuted, "verdict": line.verdict} for line in lines],
        "faults": [{**asdict(line), "verdict": line.verdict} for line in planted],
    }


if __name__ == "__main__":
    sys.exit(main())
