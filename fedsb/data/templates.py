"""Texts with places for columns, as ``data.template`` and ``data.system`` have them, and the table of those that have a name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from fedsb.config.derived import line_feeds
from fedsb.core.errors import UserError, nearest

PLACE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
INSTRUCTION = "### Instruction:\n{instruction}\n\n"
RESPONSE = "### Response:\n{output}"


@dataclass(frozen=True)
class Form:
    """A text with places for columns.

    Attributes:
        pieces: what stands before, between and behind the columns; one more than there are columns.
        columns: their names, in the order of their places.
    """

    pieces: tuple[str, ...]
    columns: tuple[str, ...]

    def filled(self, values: Mapping[str, str]) -> str:
        """Return the text with the columns' values in their places."""
        found = [self.pieces[0]]
        for column, piece in zip(self.columns, self.pieces[1:], strict=True):
            found += [values[column], piece]
        return "".join(found)


# By name, what an example is written as: the first text whose columns all say something. The last column is the response.
TEMPLATES: Mapping[str, tuple[str, ...]] = {
    # https://github.com/tatsu-lab/stanford_alpaca, with and without an input
    "alpaca": (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n" + INSTRUCTION + "### Input:\n{input}\n\n" + RESPONSE,
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n" + INSTRUCTION + RESPONSE,
    ),
    "plain": ("User: {prompt}\nAssistant: {response}",),
}
# What a conversation is written as where the tokenizer has no chat template: what stands before each turn. Of one question and one answer
# it makes what the template of that name makes of prompt and response.
PLAIN: Mapping[str, str] = {"system": "System: ", "user": "User: ", "assistant": "Assistant: "}


@lru_cache
def form_of(text: str, key: str) -> Form:
    r"""Read a text with ``{column}``; ``{{`` and ``}}`` are braces, and ``\n`` is a line feed, as shells leave it.

    Raises:
        UserError: a brace is open, or a column has no name.
    """
    pieces, columns, last = [""], [], 0
    text = line_feeds(text)
    for found in PLACE.finditer(text):
        pieces[-1] += text[last : found.start()]
        last = found.end()
        if found[0] in ("{{", "}}"):
            pieces[-1] += found[0][0]
        elif found[1]:
            columns.append(found[1])
            pieces.append("")
        else:
            raise UserError(f"{key} holds '{found[0]}': a column is {{name}}, and a brace of the text itself {{{{ or }}}}")
    pieces[-1] += text[last:]
    return Form(tuple(pieces), tuple(columns))


@lru_cache
def forms_of(template: str) -> tuple[Form, ...]:
    """Return the forms of ``data.template``: those of a name, or the one of a user's own text.

    Raises:
        UserError: it is neither a name nor a text with columns.
    """
    if template in TEMPLATES:
        return tuple(form_of(text, "data.template") for text in TEMPLATES[template])
    own = form_of(template, "data.template")
    if not own.columns:
        raise UserError(
            f"unknown data.template '{template}'{nearest(template, TEMPLATES)}; choose from {', '.join(TEMPLATES)}, or give a text with "
            "columns, the last of which is the response: 'Q: {question}\\nA: {answer}'"
        )
    if len(set(own.columns)) != len(own.columns):
        raise UserError("data.template names a column twice; name each once")
    return (own,)
