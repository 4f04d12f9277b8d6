"""Train the packaged language model federatedly on questions, and show its answers to two of them before and after.

Usage: python scripts/demo_llm.py [Hydra overrides …]. What it runs is ``fedsb run experiment=demo_llm``; it exits as that does.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from fedsb.commands.outcome import guarded
from fedsb.commands.run import run
from fedsb.core.streams import hand_on, spell_out

SHOWN = 2  # questions


def main(overrides: list[str]) -> int:
    """Run, show, and return the exit status."""
    if {"-h", "--help"} & {*overrides}:
        print((__doc__ or "").strip())
        return 0
    with tempfile.TemporaryDirectory(prefix="fedsb-") as scratch:
        folder = Path(scratch) / "run"
        status = run(["experiment=demo_llm", "progress=lines", f"output='{folder}'", *overrides])
        if not status:
            show(folder)
    return status


def show(folder: Path) -> None:
    """Print what the untouched base and the trained model answer to some questions of the test part."""
    from fedsb.app.assembly import measured_examples
    from fedsb.app.measuring.evaluating import evaluation
    from fedsb.config.compose import read

    few = [f"eval.max_examples={SHOWN}"]
    questions = measured_examples(read(folder / "config.yaml", few)).texts
    found = evaluation(folder, few, ["exact_match"])
    for row, line in zip(questions, map(json.loads, found.answers), strict=True):
        print(f"\n{json.loads(row)['prompt']}\n  the answer: {line['reference']}")
        for name in found.names:
            said = line[name]
            print(f"  {name}: {' '.join(said['response'].split()) or '(nothing)'}  [{'right' if said['right'] else 'wrong'}]")


if __name__ == "__main__":
    spell_out()
    sys.exit(hand_on(guarded(lambda: main(sys.argv[1:]))))
