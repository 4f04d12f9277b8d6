"""Instruction data: which columns a row is made of, and who says what in it.

There are three ways to give them: a prompt and its response, chat messages, and a template over named columns. A row is carried as the JSON
text of the columns that are read of it, so that whatever carries texts carries it; :func:`turns_of` says what it holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from fedsb.config.schema import DataConfig
from fedsb.core.errors import UserError, nearest
from fedsb.data.cells import is_torn, shown
from fedsb.data.templates import form_of, forms_of

ROLES = ("system", "user", "assistant")
May = Literal["be full", "be empty", "be missing"]  # what a column may be


class Turn(NamedTuple):
    """A part of an example: who says it (of a template: in which column it stands), and what."""

    role: str
    content: str


class RowError(Exception):
    """Why a row cannot be used: in words that hold nothing of it, and in all detail."""

    def __init__(self, why: str, detail: str | None = None) -> None:
        super().__init__(why)
        self.detail = detail or why


@dataclass(frozen=True)
class Way:
    """One way to give instruction data.

    Attributes:
        columns: the columns that a configuration names, and what each may be: full in every row, empty in some, or not there at all.
        kept: checks a row's values, and returns what is kept of them.
        turns: what a kept row says.
    """

    columns: Callable[[DataConfig], Mapping[str, May]]
    kept: Callable[[DataConfig, Mapping[str, Any]], dict[str, Any]]
    turns: Callable[[DataConfig, Mapping[str, Any]], list[Turn]]


def way_of(cfg: DataConfig) -> str | None:
    """Return the key of :data:`WAYS` that a configuration gives; None where examples are plain texts."""
    return next((key for key in WAYS if getattr(cfg, key) is not None), None)


def columns_of(cfg: DataConfig) -> Mapping[str, May]:
    """Return the columns of instruction data, and what each may be; none where examples are plain texts.

    Raises:
        UserError: a template cannot be read, or the choices are a column that is written too.
    """
    if (way := way_of(cfg)) is None:
        return {}
    written = WAYS[way].columns(cfg)
    if cfg.choices in written:
        raise UserError(f"data.choices={cfg.choices}: that column is written in prompt or response; give the choices one of their own")
    return written if cfg.choices is None else {cfg.choices: "be missing", **written}


def row_text(cfg: DataConfig, values: Mapping[str, Any]) -> str:
    """Check the values of a row and return it as a text.

    Raises:
        RowError: it cannot be used.
    """
    way = WAYS[way_of(cfg) or ""]
    kept = way.kept(cfg, values)
    said = way.turns(cfg, kept)
    return json.dumps(kept | _choices(cfg, values, said[-1].content), ensure_ascii=False)


def turns_of(cfg: DataConfig, text: str) -> list[Turn]:
    """Return what a row says, none where it is empty; of a template one turn a column."""
    return WAYS[way_of(cfg) or ""].turns(cfg, json.loads(text)) if text else []


def choices_of(cfg: DataConfig, text: str) -> list[str]:
    """Return the answers that a row gives to choose from; none where it has none."""
    found: list[str] = json.loads(text).get(cfg.choices, []) if text else []
    return found


def answered_with(cfg: DataConfig, text: str, answer: str) -> str:
    """Return a row of prompt and response, or of a template, with another response."""
    column = cfg.response if cfg.template is None else forms_of(cfg.template)[0].columns[-1]
    return json.dumps({**json.loads(text), str(column): answer}, ensure_ascii=False)


def _choices(cfg: DataConfig, values: Mapping[str, Any], response: str) -> dict[str, list[str]]:
    if cfg.choices is None or values.get(cfg.choices) is None:
        return {}
    found = [_text(each, "choice", empty=False) for each in _listed(values[cfg.choices], "choices", "texts")]
    if len(set(found)) < max(2, len(found)):
        raise RowError("fewer than two different choices", f"the choices {shown(found)}; two at least are needed, each once")
    right_of(response, found)
    return {cfg.choices: found}


def right_of(response: str, choices: Sequence[str]) -> int:
    """Return the index of a response among the choices.

    Raises:
        RowError: it is none of them, as a letter or a number that stands for one is none.
    """
    if response not in choices:
        raise RowError(
            "a response that is none of its choices", f"the response {shown(response)}, which is none of the choices {shown(list(choices))}"
        )
    return choices.index(response)


def shortened(text: str, most: int, turns: int) -> str:
    """Return a row of which no more than the first ``most`` characters, in the first ``turns`` messages (or choices), are said."""
    if len(text) <= min(most, turns):
        return text

    def cut(value: Any) -> Any:
        nonlocal most
        if isinstance(value, list):
            return [{**each, "content": cut(each["content"])} if isinstance(each, dict) else cut(each) for each in value[:turns]]
        value, most = value[:most], max(0, most - len(value))
        return value

    return json.dumps({column: cut(value) for column, value in json.loads(text).items()}, ensure_ascii=False)


def _text(value: Any, what: str, *, empty: bool) -> str:
    if value is None and empty:
        return ""
    if not isinstance(value, str):
        raise RowError(f"no {what}" if value is None else f"a {what} that is no text", f"{shown(value)} as {what}, which is no text")
    if is_torn(value):
        raise RowError("half of a character", f"{shown(value)}, with half of a character")
    if not empty and not value.strip():
        raise RowError(f"an empty {what}")
    return value


def _system(cfg: DataConfig) -> Mapping[str, May]:
    return dict.fromkeys(form_of(cfg.system, "data.system").columns, "be empty") if cfg.system is not None else {}


def _system_values(cfg: DataConfig, values: Mapping[str, Any]) -> dict[str, str]:
    return {name: _text(values.get(name), "system text", empty=True) for name in _system(cfg)}


def _said_before(cfg: DataConfig, kept: Mapping[str, Any]) -> list[Turn]:
    said = form_of(cfg.system, "data.system").filled(kept) if cfg.system is not None else ""
    return [Turn("system", said)] if said.strip() else []


def _pair_kept(cfg: DataConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    own = {str(getattr(cfg, key)): _text(values[getattr(cfg, key)], key, empty=False) for key in ("prompt", "response")}
    return _system_values(cfg, values) | own


def _pair_turns(cfg: DataConfig, kept: Mapping[str, Any]) -> list[Turn]:
    return [*_said_before(cfg, kept), Turn("user", kept[str(cfg.prompt)]), Turn("assistant", kept[str(cfg.response)])]


def _chat_kept(cfg: DataConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    column = str(cfg.messages)
    messages = [_message(message) for message in _listed(values[column], "messages", "messages {role, content}")]
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise RowError("an empty response", "nothing that an assistant says, and nothing to learn")
    return _system_values(cfg, values) | {column: messages}


def _listed(value: Any, what: str, of: str) -> Sequence[Any]:
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list | tuple):
        raise RowError(f"no list of {what}", f"{shown(value)}, which is no list of {of}")
    return found


def _message(message: Any) -> dict[str, str]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise RowError("a message without role or content", f"the message {shown(message)}; each has a role and a content")
    role = message["role"]
    if role not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        raise RowError("an unknown role", f"the role {shown(role)}{hint}; known roles: {', '.join(ROLES)}")
    return {"role": role, "content": _text(message["content"], "content", empty=role != "user")}


def _chat_turns(cfg: DataConfig, kept: Mapping[str, Any]) -> list[Turn]:
    turns = [Turn(message["role"], message["content"]) for message in kept[str(cfg.messages)]]
    return turns if turns[0].role == "system" else [*_said_before(cfg, kept), *turns]


def _template_columns(cfg: DataConfig) -> Mapping[str, May]:
    forms = forms_of(str(cfg.template))
    everywhere = {column for column in forms[0].columns if all(column in form.columns for form in forms)}
    return {column: "be full" if column in everywhere else "be missing" for form in forms for column in form.columns}


def _template_kept(cfg: DataConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    response = forms_of(str(cfg.template))[0].columns[-1]
    return {name: _text(values.get(name), name, empty=name != response) for name in _template_columns(cfg)}


def _template_turns(cfg: DataConfig, kept: Mapping[str, Any]) -> list[Turn]:
    forms = forms_of(str(cfg.template))
    form = next((form for form in forms if all(kept[column].strip() for column in form.columns)), forms[-1])
    return [Turn(column, kept[column]) for column in form.columns]


WAYS: Mapping[str, Way] = {
    "prompt": Way(lambda cfg: {**_system(cfg), str(cfg.prompt): "be full", str(cfg.response): "be full"}, _pair_kept, _pair_turns),
    "messages": Way(lambda cfg: {**_system(cfg), str(cfg.messages): "be full"}, _chat_kept, _chat_turns),
    "template": Way(_template_columns, _template_kept, _template_turns),
}
