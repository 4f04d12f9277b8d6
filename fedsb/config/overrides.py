"""Overrides as people write them, and as Hydra's parser can read them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from fedsb.core.errors import UserError

FOREIGN = re.compile(r"[^\x20-\x7e]|[#;&!~<>^`]")  # what Hydra's lexer knows nowhere but in quotes
ELEMENT = re.compile(r"[^,\[\]{}'\"]+")
# What is chosen of a method or of its family: each knows its own keys and refuses others, and conf/ names those with a default alone.
OPEN = ("adapter.options.", "method.options.")
CALL = re.compile(r"\w+ ?\([^)]*\)?$")  # choice(1, 2), also with its end missing


def readable(text: str) -> str:
    """Return an override with those quotes around its value, or around elements of it, without which it could not be read.

    A value that Hydra can read stays as it is; a key below :data:`OPEN` may be a new one. Where quotes would decide what was meant (a
    comma, a bracket or a call may be part of a name, or not), nobody decides it here.

    Raises:
        UserError: it cannot be read, and it is not plain what is meant.
    """
    key, equals, value = text.partition("=")
    if not equals and not key.startswith("~"):
        raise UserError(f"cannot read '{text}': an override is KEY=VALUE, as in rank=8")
    if key.startswith(OPEN):
        text, key = f"++{text}", f"++{key}"
    for candidate in (text, *(f"{key}={quoted}" for quoted in _quotings(value))):
        if _parsed(candidate) is not None:
            return candidate
    raise UserError(
        f"cannot read '{text}': close its brackets and quotes; a value with letters or signs that Hydra does not know, or one in which "
        f'commas and brackets are meant as they stand, needs two pairs of quotes: "{key}={_quoted(value)}"'
    )


def _quotings(value: str) -> Iterator[str]:
    yield ELEMENT.sub(lambda found: _quoted(found[0]) if FOREIGN.search(found[0]) else found[0], value)
    if "," not in value and not value.startswith(("[", "{", "'", '"')) and not CALL.match(value):
        yield _quoted(value)


def _quoted(value: str) -> str:
    return str(QuotedString(text=value, quote=Quote.single).with_quotes())


def _parsed(text: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        return None


def check_single(overrides: Sequence[str]) -> None:
    """Hold that no override names several values.

    Raises:
        UserError: one does, which only a sweep may.
    """
    for text in overrides:
        override = _parsed(text)
        if override is not None and override.is_sweep_override():
            key, _, value = text.partition("=")
            raise UserError(
                f"'{text}' names several values: add -m for a sweep, write {key}=[…] for a list, or quote it twice where it is one value: "
                f'"{key}={_quoted(value)}"'
            )


def sweep_jobs(overrides: Sequence[str]) -> list[list[str]]:
    """Expand ``a=1,2 b=3`` into one list of overrides a job, so that all are checked before the first runs.

    Raises:
        UserError: an override that Hydra cannot read, or a sweep whose values are not named.
    """
    choices: list[list[str]] = []
    for text in map(readable, overrides):
        override = OverridesParser.create().parse_override(text)
        key = override.get_key_element()
        try:
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()] if override.is_sweep_override() else [text])
        except HydraException as error:
            raise UserError(f"cannot sweep over '{text}': name the values, as in {key}=a,b ({' '.join(str(error).split())[:80]})") from None
    return [list(job) for job in itertools.product(*choices)]
