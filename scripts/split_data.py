"""Write the parts of a simulation as files, so that a real federation can be tried on one machine.

    python scripts/split_data.py OUT [overrides…]

writes ``OUT/<client>/train.jsonl`` for every client, ``OUT/server/test.jsonl`` (with ``data.validation_fraction`` a ``validation.jsonl``
beside it) and ``OUT/labels.txt``. A SuperNode whose data path is ``OUT/<client>`` then trains on exactly the examples of the simulated
client, in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fedsb.app.assembly import corpus_of, parts_of, peopled
from fedsb.config.compose import load
from fedsb.core.disk import reason_of
from fedsb.core.errors import UserError
from fedsb.core.folders import filled_whole
from fedsb.data.writing import write_rows


def split(out: Path, overrides: Sequence[str]) -> None:
    """Load, partition and write, all of it or nothing; what lies in ``out`` and has another name stays."""
    config = peopled(load(overrides))
    corpus, parts = corpus_of(config), parts_of(config)
    with filled_whole(out) as scratch:
        for name, indices in parts.items():
            write_rows(scratch / name / "train.jsonl", corpus.train.take(indices), config.data, labels=corpus.labels)
        write_rows(scratch / "server" / "test.jsonl", corpus.test, config.data, labels=corpus.labels)
        if corpus.validation is not None:
            write_rows(scratch / "server" / "validation.jsonl", corpus.validation, config.data, labels=corpus.labels)
        (scratch / "labels.txt").write_text("".join(f"{label}\n" for label in corpus.labels), encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """Run the script; return its exit status."""
    if not arguments or "=" in arguments[0]:
        print("usage: split_data.py OUT [overrides…]", file=sys.stderr)
        return 2
    try:
        split(Path(arguments[0]), arguments[1:])
    except UserError as error:
        print(f"split_data.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"split_data.py: {reason_of(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
