"""``fedsb worker`` that notes each model it loads: python counted_worker.py FILE ARGUMENTS."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fedsb.cli import main
from fedsb.models import build


def counted(path: Path) -> None:
    """Let each load of a model leave a line in a file."""
    real = build.build_model

    def build_model(model: Any, *arguments: Any, **options: Any) -> Any:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{model.name}\n")
        return real(model, *arguments, **options)

    build.build_model = build_model


if __name__ == "__main__":
    counted(Path(sys.argv[1]))
    sys.argv[:] = ["fedsb", "worker", *sys.argv[2:]]
    main()
