"""What ``datasets`` loads: hub ids, folders in any form that it knows, and what its ``save_to_disk`` wrote.

``datasets`` takes a second to import in each process, so this is imported by whoever reads such a source, at that moment.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.parquet.parquet import Parquet

from fedsb.config.schema import DataConfig
from fedsb.core.errors import UserError
from fedsb.data.tables import Rows, one_line

# What of a folder's readers takes the names of columns, and how; that of JSON looks at all of them.
PROJECTIONS: Mapping[type, str] = {Csv: "usecols", Parquet: "columns"}


def load_folder(path: Path, cfg: DataConfig, wanted: Collection[str]) -> list[datasets.Dataset]:
    """Load the training split of a local folder, and the test split where one is named; of the columns the wanted ones, where it can."""
    builder = datasets.load_dataset_builder(str(path), cfg.subset)
    for kind, option in PROJECTIONS.items():
        if isinstance(builder, kind):
            # Without one of them all columns are read, to say which there are.
            with suppress(Exception):
                return load_hub(str(path), cfg, **{option: sorted(wanted)})
    return load_hub(str(path), cfg)


def load_hub(path: str, cfg: DataConfig, **options: Any) -> list[datasets.Dataset]:
    """Load the training split of a hub id or folder, and the test split where one is named."""
    wanted = [cfg.train_split, *([cfg.test_split] if cfg.test_split else [])]
    loaded: list[datasets.Dataset] = datasets.load_dataset(path, cfg.subset, split=wanted, **options)
    return loaded


def load_saved(path: Path, only: str, wanted: Collection[str]) -> Mapping[str, Callable[[], Rows]]:
    """Return how to read each table that ``save_to_disk`` wrote, by name; ``only`` names one that stands alone.

    Raises:
        UserError: the folder is no such data set.
    """
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is no data set that save_to_disk wrote ({one_line(error)})") from None
    tables = loaded if isinstance(loaded, datasets.DatasetDict) else {only: loaded}
    return {name: partial(narrowed, tables[name], wanted) for name in tables}


def narrowed(rows: datasets.Dataset, wanted: Collection[str]) -> datasets.Dataset:
    """Leave what is not wanted of a data set undecoded, be it images; one that lacks a column keeps all, so that they can be named."""
    return rows.select_columns([name for name in rows.column_names if name in wanted]) if set(wanted) <= set(rows.column_names) else rows
