"""Examples as the rest of the project sees them: texts and targets, whatever table they came from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedsb.config.schema import DataConfig
from fedsb.core.errors import UserError, nearest
from fedsb.data.cells import check_one_kind, check_whole, shown
from fedsb.data.instructions import May, RowError, columns_of, row_text, way_of
from fedsb.data.tables import Rows, class_names

MANY = 10  # rows, of which no two have the same label: those are numbers, or names of the rows
Targets = tuple[int, ...] | tuple[float, ...] | None


@dataclass(frozen=True)
class Examples:
    """A list of examples, column by column; every column that is not None has one entry an example.

    Attributes:
        texts: what the model reads; of instruction data a row as :mod:`fedsb.data.instructions` carries it.
        pairs: the second text of a pair of columns.
        targets: class index, real number, or None for a language model.
        owners: who an example belongs to, out of a natural column.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None = None
    targets: Targets = None
    owners: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def sha256(self) -> str:
        """Return the hash of what the model reads, the targets, and the order of both."""
        digest = hashlib.sha256()
        for column in (self.texts, self.pairs, self.targets):
            digest.update(json.dumps(column).encode())
        return digest.hexdigest()

    def whole_texts(self) -> list[tuple[str, ...]]:
        """Return what is read of each example: a text, or both of a pair."""
        return list(zip(*(column for column in (self.texts, self.pairs) if column is not None), strict=True))

    def take(self, indices: Iterable[int]) -> Examples:
        """Return the examples at ``indices``, in that order."""
        rows = list(indices)
        columns = {name: getattr(self, name) for name in ("texts", "pairs", "targets", "owners")}
        return replace(self, **{name: tuple(column[i] for i in rows) for name, column in columns.items() if column is not None})


PARTS: Mapping[str, str] = {
    "train": "the training part",
    "test": "the test part",
    "public": "the public part",
    "validation": "the validation part",
    "site": "the client's own data",
}
_FOREIGN_LABEL: Mapping[str, str] = {
    "train": "label '{label}' (row {row} of the training part) is not in data.labels=[{known}]; add it there or remove its rows",
    "test": "label '{label}' (row {row}) is seen only in the test part, the labels are {known}; name them all in data.labels=[…], "
    "or drop data.test_path and data.test_split so that data.test_fraction splits the training part",
    "public": "label '{label}' (row {row}) is seen only in the public part, the labels are {known}; name them all in data.labels=[…]",
    "validation": "label '{label}' (row {row}) is only in the validation part, the labels are {known}; name them all in data.labels=[…]",
    "site": "label '{label}' (row {row} of the client's own data) is not a label of the run, which has {known}; "
    "correct it, or name it in data.labels=[…] for everyone",
}


def read_examples(
    dataset: Rows, cfg: DataConfig, labels: Sequence[str], owner_column: str | None = None, *, part: str = "train"
) -> Examples:
    """Read the columns that the configuration names.

    Args:
        dataset: raw rows.
        cfg: names the columns and the task.
        labels: names of the classes in order; not looked at unless the task is classification.
        owner_column: the natural column to keep, if any.
        part: which of :data:`PARTS` this is, for the message of an error.

    Raises:
        UserError: no rows, a missing column, a row without text, label or owner, a label that is not in ``labels``, or a target
            that is no finite number.
    """
    if not len(dataset):
        raise UserError(f"{PARTS[part]} has no rows; check data.path and data.test_path")
    first, second = text_columns(cfg) if way_of(cfg) is None else (None, None)
    return Examples(
        texts=_texts(dataset, first, part) if first else _conversations(dataset, cfg, part),
        pairs=_texts(dataset, second, part) if second else None,
        targets=_TARGETS[cfg.task](dataset, cfg, labels, part),
        owners=_owners(dataset, owner_column, part) if owner_column else None,
    )


def find_labels(dataset: Rows, cfg: DataConfig, *, part: str = "train") -> tuple[str, ...]:
    """Return the names of the classes in order: ``data.labels``, else the names of a ``ClassLabel`` column, else what occurs.

    Raises:
        UserError: names given twice, a missing column, a row without a label, one class alone, or as many as rows.
    """
    if cfg.task != "classification":
        return ()
    if cfg.labels is not None:
        return _given_labels(cfg.labels)
    column = label_column(cfg)
    values = _label_texts(dataset, column, part)
    labels = class_names(dataset, column) or natural_order(values)
    if len(labels) == 1:
        raise UserError(
            f"data.label={column}: every row of {PARTS[part]} has the label '{labels[0]}', and one class is no classification; "
            "name another column, or all classes in data.labels=[…]"
        )
    if part == "train" and len(set(values)) == len(values) >= MANY:
        raise UserError(
            f"data.label={column}: no two of the {len(values):,} rows of {PARTS[part]} have the same label, so none can be learnt; "
            "name the column of the classes, or add data.task=regression"
        )
    return labels


def _given_labels(labels: Iterable[str | int]) -> tuple[str, ...]:
    given = tuple(str(label) for label in labels)
    if len(set(given)) != len(given):
        raise UserError(f"data.labels=[{', '.join(given)}] names a label twice; name each once")
    if len(given) < 2:
        raise UserError(f"data.labels=[{', '.join(given)}]: one class is no classification; name all of them, or leave it out")
    return given


def natural_order(values: Iterable[str]) -> tuple[str, ...]:
    """Sort distinct values: by number where all are whole numbers (also as text, so that a round trip through a file keeps the order)."""
    distinct = set(values)
    whole = all(value.removeprefix("-").isdecimal() for value in distinct)
    return tuple(sorted(distinct, key=(lambda v: (int(v), v)) if whole else (lambda v: (0, v))))


def text_columns(cfg: DataConfig) -> tuple[str, str | None]:
    """Return the column of texts, and the second one of a pair.

    Raises:
        UserError: more than two are named.
    """
    columns = (cfg.text,) if isinstance(cfg.text, str) else cfg.text or ()
    if len(columns) not in (1, 2):
        raise UserError(f"data.text=[{', '.join(columns)}] names {len(columns)} columns; give one, or a pair")
    return columns[0], columns[1] if len(columns) == 2 else None


def label_column(cfg: DataConfig) -> str:
    """Return the column of targets.

    Raises:
        UserError: none is named.
    """
    if cfg.label is None:
        raise UserError(f"data.label must be given for data.task={cfg.task}: add data.label=COLUMN")
    return cfg.label


def _column(dataset: Rows, column: str, part: str, key: str, may: May = "be full") -> list[Any]:
    names = list(dataset.column_names)
    if may == "be missing" and column not in names:
        return [None] * len(dataset)
    if column not in names:
        raise UserError(f"{key}={column}: {PARTS[part]} has no such column{nearest(column, names)}; it has {', '.join(names)}")
    if names.count(column) > 1:
        raise UserError(f"{key}={column}: {PARTS[part]} has {names.count(column)} columns of that name; rename all but one")
    values = list(dataset[column])
    row = next((row for row, value in enumerate(values, start=1) if value is None), None)
    if row is not None and may == "be full":
        raise UserError(f"{key}={column}: row {row} of {PARTS[part]} is empty in that column; fill it in or remove the row")
    return values


def _texts(dataset: Rows, column: str, part: str) -> tuple[str, ...]:
    values = _column(dataset, column, part, "data.text")
    for row, value in enumerate(values, start=1):
        if not isinstance(value, str):
            raise UserError(
                f"data.text={column}: row {row} of {PARTS[part]} holds {shown(value)}, which is no text; name a column of texts"
            )
    check_whole(values, f"data.text={column}", PARTS[part])
    return tuple(values)


def _conversations(dataset: Rows, cfg: DataConfig, part: str) -> tuple[str, ...]:
    way = f"data.{way_of(cfg)}"
    columns = {name: _column(dataset, name, part, _key_of(cfg, name), may) for name, may in columns_of(cfg).items()}
    found = []
    for row, values in enumerate(zip(*columns.values(), strict=True), start=1):
        try:
            found.append(row_text(cfg, dict(zip(columns, values, strict=True))))
        except RowError as error:
            raise UserError(f"{way}: row {row} of {PARTS[part]} holds {error.detail}; correct it or remove the row") from None
    return tuple(found)


def _key_of(cfg: DataConfig, column: str) -> str:
    """Return the key that names a column of instruction data."""
    key = next((key for key in ("prompt", "response", "messages") if getattr(cfg, key) == column), None)
    return f"data.{key}" if key else f"data.{'template' if cfg.template is not None else 'system'} with column"


def _owners(dataset: Rows, column: str, part: str) -> tuple[str, ...]:
    key = "federation.partition.column"
    values = _column(dataset, column, part, key)
    check_one_kind(values, f"{key}={column}", PARTS[part])
    return tuple(str(value) for value in values)


def _label_texts(dataset: Rows, column: str, part: str) -> list[str]:
    values = _column(dataset, column, part, "data.label")
    if (names := class_names(dataset, column)) is not None:
        return [_class_name(names, value, row, part) for row, value in enumerate(values, start=1)]
    check_one_kind(values, f"data.label={column}", PARTS[part])
    return [label_text(value, column, row, part) for row, value in enumerate(values, start=1)]


def _class_name(names: Sequence[str], value: int, row: int, part: str) -> str:
    # Unlabelled rows of published test splits carry -1.
    if not 0 <= value < len(names):
        raise UserError(f"row {row} of {PARTS[part]} has the label {value}, its names are {', '.join(names)}; choose a split with labels")
    return names[value]


def label_text(value: Any, column: str, row: int, part: str) -> str:
    """Return a label as text; a number that is whole is written as such.

    Raises:
        UserError: it is blank, or a number with a fraction.
    """
    if isinstance(value, str) and not value.strip():
        raise UserError(f"data.label={column}: row {row} of {PARTS[part]} is empty in that column; fill it in or remove the row")
    if not isinstance(value, float):
        return str(value)
    if not value.is_integer():
        raise UserError(f"data.label={column}: row {row} of {PARTS[part]} holds {value}, no class; use data.task=regression for numbers")
    return str(int(value))


def _classes(dataset: Rows, cfg: DataConfig, labels: Sequence[str], part: str) -> tuple[int, ...]:
    index = {label: i for i, label in enumerate(labels)}
    values = _label_texts(dataset, label_column(cfg), part)
    for row, value in enumerate(values, start=1):
        if value not in index:
            raise UserError(_FOREIGN_LABEL[part].format(label=value, row=row, known=", ".join(labels)), key="data.labels")
    return tuple(index[value] for value in values)


def _numbers(dataset: Rows, cfg: DataConfig, labels: Sequence[str], part: str) -> tuple[float, ...]:
    column = label_column(cfg)
    values = _column(dataset, column, part, "data.label")
    return tuple(_number(value, column, row, part) for row, value in enumerate(values, start=1))


def _number(value: Any, column: str, row: int, part: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"data.label={column}: row {row} of {PARTS[part]} holds {shown(value)}; data.task=regression needs finite numbers")
    return number


def _nothing(dataset: Rows, cfg: DataConfig, labels: Sequence[str], part: str) -> None:
    return None


_TARGETS: Mapping[str, Callable[[Rows, DataConfig, Sequence[str], str], Targets]] = {
    "classification": _classes,
    "regression": _numbers,
    "causal_lm": _nothing,
}
