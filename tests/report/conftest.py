"""Run folders as a run would leave them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from fedsb.run.folder import RunFolder
from fedsb.run.records import RoundRecord
from tests.report.made import Maker, make_config, make_records, make_summary


@pytest.fixture
def make_run(tmp_path: Path) -> Maker:
    """Return a function that writes a run folder."""

    def make(
        name: str = "run",
        method: str = "fed_sb",
        *,
        rank: int = 16,
        seed: int = 0,
        rounds: int = 3,
        shift: float = 0.0,
        finished: bool = True,
        records: Sequence[RoundRecord] | None = None,
    ) -> Path:
        folder = RunFolder(tmp_path / name)
        folder.write_config(yaml.safe_dump(make_config(method, rank, seed, rounds)))
        records = make_records(method, rounds, shift) if records is None else records
        for record in records:
            folder.append(record)
        if finished:
            folder.write_summary(make_summary(records, method, rank=rank, seed=seed, rounds=rounds))
        return folder.path

    return make
