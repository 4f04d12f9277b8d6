"""Workers: one that dies between two jobs takes none with it."""

from __future__ import annotations

import operator
import os
from functools import partial
from pathlib import Path

import pytest

from fedsb.sweep.crew import Crew, Event, Task


@pytest.mark.slow
def test_a_worker_that_dies_between_two_jobs_is_replaced(tmp_path: Path) -> None:
    task = Task(partial(operator.mul, 0), {number: tmp_path / str(number) for number in range(2)}, tmp_path, dict(os.environ))
    with Crew(1, task) as crew:
        events = crew.run([0, 1])
        assert next(events) == Event(0)
        assert next(event for event in events if event.status is not None).job == 0
        [worker] = crew._workers
        worker.process.kill()
        worker.process.join()
        told = [event for event in events if event.job is not None]
    assert [(event.job, event.status) for event in told] == [(1, None), (1, 0)]
