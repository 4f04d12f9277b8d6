"""`fedsb` with a stopwatch: tells when the first client has computed its first gradient, and ends each job there."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import psutil

from clients import local
from fedsb import cli
from fedsb.commands import run as run_command
from fedsb.core.errors import UserError

begun = psutil.Process().create_time()
sketch, run_job = local.sketch_gradients, run_command.run_job  # type: ignore[attr-defined]


def stopped(model: Any, batches: Any, *arguments: Any, **options: Any) -> Any:
    """Compute the gradient of the first micro-batch, tell the time, and end the job."""
    sketch(model, batches[:1], *arguments, **options)
    print(json.dumps({"first_gradient_s": time.time() - begun}), flush=True)
    raise KeyboardInterrupt


def timed(*arguments: Any) -> int:
    """Run a job from now on, or from the start of the process where it is the first."""
    global begun
    try:
        return run_job(*arguments)
    except KeyboardInterrupt:
        begun = time.time()
        raise UserError("measured") from None


local.sketch_gradients = stopped  # type: ignore[attr-defined]
run_command.run_job = timed  # type: ignore[assignment]

if __name__ == "__main__":
    cli.main(sys.argv[1:])
