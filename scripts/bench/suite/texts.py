"""The data of the comparison, as JSON lines with a text, a label and an owner; none of them is fetched.

* ``bbc``: the demo's BBC News, split among clients by a Dirichlet draw.
* ``docstrings``: first sentences of the docstrings of ten installed packages (those of ``constraints.txt``). The label is what is
  documented, a class, a function or a method; the owner is the package: a natural split, of sizes and styles as they are.

A validation part, the same for all seeds, is set aside first: rates are chosen on it, and no run of the comparison sees it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from fedsb.data.sources import BBC_FOLDER, BBC_PACKAGE, packaged_texts

VALIDATION = 300  # rows
SHARE, MOST = 8, 400  # every eighth docstring of a package is taken, at most so many
PACKAGES = ("torch", "transformers", "pandas", "matplotlib", "sympy", "networkx", "ray", "aiohttp", "opacus", "fsspec")
LEAST = 6  # words of a docstring's first sentence
Row = dict[str, str]


def write(name: str, folder: Path) -> tuple[Path, Path]:
    """Write a data set's rows and its validation part, where they are not there yet, and return both paths."""
    rest, validation = folder / f"{name}.jsonl", folder / f"{name}_validation.jsonl"
    if not validation.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = sorted(SOURCES[name](), key=order)
        for path, part in ((rest, rows[VALIDATION:]), (validation, rows[:VALIDATION])):
            path.write_text("".join(f"{json.dumps(row)}\n" for row in part), encoding="utf-8")
    return rest, validation


def order(row: Row) -> str:
    """Return where a row stands: by its hash, so that no order of files tells."""
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()


def bbc() -> list[Row]:
    """Return the articles of BBC News with their topics."""
    return [
        {"text": path.read_text(encoding="utf-8", errors="replace"), "label": path.parent.name, "owner": ""}
        for path in packaged_texts(BBC_PACKAGE, BBC_FOLDER)
    ]


def docstrings() -> list[Row]:
    """Return what packages say of their classes, functions and methods; of each a share, those that come first by their hash."""
    rows: list[Row] = []
    for package in PACKAGES:
        found = {row["text"]: row for path in sources(package) for row in documented(path, package)}
        rows += sorted(found.values(), key=order)[: min(len(found) // SHARE, MOST)]
    return rows


def sources(package: str) -> Sequence[Path]:
    """Return the files of an installed package, its tests aside."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return [path for path in sorted(Path(spec.origin).parent.rglob("*.py")) if "tests" not in path.parts]


def documented(path: Path, owner: str) -> Iterator[Row]:
    """Yield a row for each docstring of a file whose first sentence is long enough."""
    with warnings.catch_warnings(action="ignore"):  # of escapes in strings that no longer mean themselves
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except SyntaxError:  # written for a later Python
            return
    for parent in ast.walk(tree):
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                sentence = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                kind = "class" if isinstance(node, ast.ClassDef) else "method" if isinstance(parent, ast.ClassDef) else "function"
                if len(sentence.split()) >= LEAST:
                    yield {"text": sentence, "label": kind, "owner": owner}


SOURCES = {"bbc": bbc, "docstrings": docstrings}
