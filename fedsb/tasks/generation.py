"""Responses: batches of prompts, padded on the left, decoded by transformers with a key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteriaList

from fedsb.core.counting import count
from fedsb.data import packed, pad_id
from fedsb.data.framing import special_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


RESPONSES = "responses"  # what is counted
LOOKS = 16  # tokens between two counts inside a batch


@dataclass(frozen=True)
class Decoding:
    """How responses are generated.

    Attributes:
        max_new_tokens: tokens of a response, at most.
        temperature: 0 for the likeliest token each time; above it tokens are drawn from torch's global generator.
        top_p: of the likeliest tokens that together have this probability (Holtzman et al. 2020); 1 for all.
        stop: texts that end a response, and are no part of it; special tokens as they are written among them.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


def generate(
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    ends: Sequence[int],
    most: int,
    tokens: int,
) -> list[list[int]]:
    """Return the tokens of a response to each prompt, without the one that ends it.

    What a model's own generation_config.json says (penalties, temperature) is left out of account: scores of two models compare.

    Args:
        network: a causal language model, in evaluation mode.
        tokenizer: of the model.
        prompts: token ids, none of them empty.
        decoding: how.
        ends: ids that end a response.
        most: prompts a batch.
        tokens: tokens a batch, padding and responses included.
    """
    batches = packed([len(prompt) + decoding.max_new_tokens for prompt in prompts], most=most, tokens=tokens)
    found: dict[int, list[int]] = {}
    count(RESPONSES, 0, len(prompts))
    with torch.inference_mode(), _own_settings(network):
        for batch in batches:
            so_far = _Counting(ends, len(found), len(prompts))
            rows = _batch(network, tokenizer, [prompts[i] for i in batch], decoding, ends, so_far)
            found |= zip(batch, (_until(row, ends) for row in rows.tolist()), strict=True)
            count(RESPONSES, len(found), len(prompts))
    return [found[i] for i in range(len(prompts))]


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: Sequence[str] = ()) -> str:
    """Return a response as a text: without special tokens, and cut where the first of the ``stop`` texts begins.

    One that holds a special token as it is written (``</s>``) is looked for where these still stand, any other in what users see.
    """
    said, (spelt, plain) = _said(tokenizer, ids), _by_sight(tokenizer, stop)
    found = [said] if (place := _stop_in(said, plain)) is None else [said[:place]]
    text = _as_written(tokenizer, ids) if spelt else ""
    if (end := _stop_in(text, spelt)) is not None:
        whole, before = _tokens_before(tokenizer, ids, text, end)
        cut = ids[whole] in special_texts(tokenizer).values()
        found.append(_said(tokenizer, ids[:whole]) + ("" if cut else text[before:end]))
    return min(found, key=len)


def _by_sight(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the texts in which a whole special token is written from those without."""
    special = special_texts(tokenizer)
    spelt = [each for each in stop if any(name in each for name in special)]
    return spelt, [each for each in stop if each not in spelt]


def _tokens_before(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str, end: int) -> tuple[int, int]:
    """Return how many tokens make up a text before a place in it, the one across that place not among them, and the length of theirs."""
    for whole in range(len(ids) - 1, 0, -1):
        before = _as_written(tokenizer, ids[:whole])
        if len(before) <= end and text.startswith(before):
            return whole, len(before)
    return 0, 0


def _stop_in(text: str, stop: Sequence[str]) -> int | None:
    return min((place for each in stop if (place := text.find(each)) >= 0), default=None)


def _as_written(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _said(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _batch(
    network: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    ends: Sequence[int],
    so_far: _Counting,
) -> Tensor:
    longest, fill = max(map(len, prompts)), pad_id(tokenizer)
    so_far.begins = longest
    device = next(network.parameters()).device
    ids = torch.tensor([[fill] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    config = _settings(decoding, ends, fill)
    stops = StoppingCriteriaList([so_far, *([_Stop(tokenizer, decoding.stop, longest)] if decoding.stop else [])])
    out: Tensor = network.generate(input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=stops)
    return out[:, longest:]


class _Counting:
    """Ends nothing: counts the responses that have ended, now and then, since a batch of long ones takes minutes."""

    def __init__(self, ends: Sequence[int], before: int, total: int) -> None:
        self._ends, self._before, self._total = ends, before, total
        self.begins = 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if (input_ids.shape[1] - self.begins) % LOOKS == 0:
            over = torch.isin(input_ids[:, self.begins :], torch.tensor(self._ends, device=input_ids.device)).any(dim=1)
            count(RESPONSES, self._before + int(over.sum()), self._total)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Stop:
    """A criterion that ends a response which holds a stop text; transformers' own looks at how tokens are spelt, and knows few of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], begins: int) -> None:
        self._tokenizer, self._begins = tokenizer, begins
        self._spelt, self._plain = _by_sight(tokenizer, stop)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        rows = input_ids[:, self._begins :].tolist()
        return torch.tensor([self._holds(row) for row in rows], device=input_ids.device)

    def _holds(self, ids: Sequence[int]) -> bool:
        written = _as_written(self._tokenizer, ids) if self._spelt else ""
        seen = _said(self._tokenizer, ids) if self._plain else ""
        return _stop_in(written, self._spelt) is not None or _stop_in(seen, self._plain) is not None


def _settings(decoding: Decoding, ends: Sequence[int], fill: int) -> GenerationConfig:
    draws = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0} if decoding.temperature else {}
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=bool(decoding.temperature),
        num_beams=1,
        use_cache=True,
        eos_token_id=list(ends) or None,
        # Behind the end of a response: an end too, so that it is cut off with it.
        pad_token_id=ends[0] if ends else fill,
        **draws,
    )


@contextmanager
def _own_settings(network: Any) -> Iterator[None]:
    before = network.generation_config
    network.generation_config = GenerationConfig()
    try:
        yield
    finally:
        network.generation_config = before


def _until(row: list[int], ends: Sequence[int]) -> list[int]:
    return row[: next((place for place, token in enumerate(row) if token in ends), len(row))]
