"""What a single value of a table may be, and how it is named where it is something else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

from fedsb.core.errors import UserError

LONGEST = 40  # characters of a value in a message


def shown(value: Any) -> str:
    """Return a value as a message shows it: on one line, short, and in characters that every terminal has."""
    text = ascii(value) if is_torn(value) else repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def check_one_kind(values: Sequence[Any], said: str, part: str) -> None:
    """Hold that a column has single values of one kind: numbers, texts, or true and false.

    Args:
        values: a column without gaps.
        said: the key and the column, for the message.
        part: what the rows are, for the message.

    Raises:
        UserError: a list or an object, two kinds, or half a character.
    """
    for row, value in enumerate(values, start=1):
        kind = kind_of(value)
        if kind is None:
            raise UserError(
                f"{said}: row {row} of {part} holds {shown(value)}, which is no single value; name a column with one word or number a row"
            )
        if kind != kind_of(values[0]):
            raise UserError(
                f"{said}: row {row} of {part} holds {shown(value)}, {kind}, and row 1 holds {shown(values[0])}, {kind_of(values[0])}; "
                "write all of them in one way"
            )
    check_whole(values, said, part)


def check_whole(values: Iterable[Any], said: str, part: str) -> None:
    """Hold that no text has half of a character, as an emoji cut in two leaves it: no tokenizer and no file takes that.

    Raises:
        UserError: one has.
    """
    for row, value in enumerate(values, start=1):
        if is_torn(value):
            raise UserError(f"{said}: row {row} of {part} holds {shown(value)}, with half of a character; correct it or remove the row")


def is_torn(value: Any) -> bool:
    """Tell whether a text has half of a character."""
    return isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value)


def kind_of(value: Any) -> str | None:
    """Name the kind of a single value; None for what holds several, or raw bytes."""
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, int | float | Decimal):
        return "a number"
    if isinstance(value, str):
        return "a text"
    # Dates and the like have a spelling of their own; what can be counted or walked through is no single value.
    return None if hasattr(value, "__len__") else f"a {type(value).__name__}"
