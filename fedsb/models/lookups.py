"""The tables that a model looks things up in (tokens, positions, token types), told from its modules, and a tokeniser held against them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedTokenizerBase

from fedsb.core.errors import UserError
from fedsb.core.logs import speaking_from
from fedsb.data import pad_id

POSITIONS, RELATIVE, TYPES = re.compile(r"pos(ition|_emb)|wpe"), re.compile(r"rel(ative)?_"), re.compile("token_type|segment")
UNLIMITED = 10**30


@dataclass(frozen=True)
class Tables:
    """How many rows a model has.

    Attributes:
        tokens: of its embedding.
        positions: tokens of the longest text that it can number; a very large number where nothing limits it.
        types: kinds of tokens that it tells apart; 0 where it does not ask for them.
        padding: the id that it takes for padding; None where it says none, or one that it has no row for.
    """

    tokens: int
    positions: int
    types: int
    padding: int | None


def tables_of(config: Any) -> Tables | None:
    """Return the tables of the body that a transformers configuration describes; None where it describes none.

    The body is built without weights. Some number their positions from behind the padding id, or from an offset: their table has rows
    that no text gets.
    """
    try:
        with torch.device("meta"):
            body: nn.Module = AutoModel.from_config(config)
        tokens = len(body.get_input_embeddings().weight)  # type: ignore[operator]
    except Exception:  # whatever is wrong with it, loading the model says so
        return None
    tables = [(name, m) for name, m in body.named_modules() if isinstance(m, nn.Embedding) and not RELATIVE.search(name)]
    positions = [m for name, m in tables if POSITIONS.search(name.rpartition(".")[2])]
    types = [m.num_embeddings for name, m in tables if TYPES.search(name.rpartition(".")[2])]
    asks = "token_type_ids" in signature(body.forward).parameters
    behind = next((m.padding_idx for m in positions if m.padding_idx is not None), None)
    padding = behind if behind is not None else getattr(config, "pad_token_id", None)
    return Tables(
        tokens=tokens,
        positions=min([*map(_usable, positions), _declared(config)]),
        types=min(types, default=tokens) if asks else 0,
        padding=padding if isinstance(padding, int) and 0 <= padding < tokens else None,
    )


def try_body(network: nn.Module) -> None:
    """Let the body of a network read a few made-up tokens, for whoever watches; whatever it raises is raised."""
    body: Any = getattr(network, str(network.base_model_prefix), network)
    tokens = torch.arange(4, device=next(network.parameters()).device).remainder(len(body.get_input_embeddings().weight))[None]
    reads = signature(body.forward).parameters
    with speaking_from(logging.ERROR, "transformers"):  # which kernels it would like better is no news of what may yet be refused
        body(input_ids=tokens, **({"decoder_input_ids": tokens} if "decoder_input_ids" in reads else {}))


def _usable(table: nn.Embedding) -> int:
    first = getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - int(first)


def _declared(config: Any) -> int:
    """Return what a configuration says, where there is no table too (rotary positions are good for so many)."""
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return found if isinstance(found, int) and found > 0 else UNLIMITED


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, tables: Tables, name: str) -> None:
    """Let a tokeniser give nothing that a model has no row for, in place.

    Texts are cut to the model's positions, rows filled with the id that the model takes for padding, and token types left out where the
    model does not ask for them or knows fewer.

    Raises:
        UserError: it knows tokens beyond the embedding that a text can have.
    """
    tokenizer.model_max_length = min(tokenizer.model_max_length, tables.positions)
    beyond = dict(_beyond(tokenizer, tables.tokens))
    if beyond:
        first, last = min(beyond, key=beyond.__getitem__), max(beyond.values())
        raise UserError(
            f"the tokenizer of '{name}' gives ids up to {last} ('{first}' is {beyond[first]}) and the model's embedding has "
            f"{tables.tokens} rows; save the model after resize_token_embeddings({last + 1}), or name its own tokenizer by model.tokenizer"
        )
    given = tables.padding if tables.padding is not None else pad_id(tokenizer)
    ends = tokenizer.eos_token_id
    tokenizer.fill_id = next(i for i in (given, ends, 0) if i is not None and i < tables.tokens)
    if _most_types(tokenizer) > tables.types:
        tokenizer.model_input_names = [key for key in tokenizer.model_input_names if key != "token_type_ids"]


def _beyond(tokenizer: PreTrainedTokenizerBase, rows: int) -> Iterator[tuple[str, int]]:
    """Yield the tokens without a row that can stand in a text: not the special ones, which no text spells, unless they frame it.

    What frames a text is what the tokenizer writes around it, the end that is learnt, and what its chat template names: a row with a turn
    of that kind has it, and another has not.
    """
    frame = {*tokenizer("")["input_ids"], *tokenizer("", "")["input_ids"], tokenizer.unk_token_id, tokenizer.eos_token_id}
    template = str(tokenizer.chat_template or "")
    frame |= {number for token, number in tokenizer.get_added_vocab().items() if token in template}
    idle = set(tokenizer.all_special_ids) - frame
    for token, number in tokenizer.get_vocab().items():
        if number >= rows and number not in idle:
            yield token, number


def _most_types(tokenizer: PreTrainedTokenizerBase) -> int:
    given = tokenizer("a", "a").get("token_type_ids", [-1])
    return max([*given, tokenizer.pad_token_type_id if given != [-1] else -1], default=-1) + 1
