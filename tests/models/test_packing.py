"""Packed rows compute what separate examples do, or are refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask

from fedsb.config.compose import load
from fedsb.config.derived import KEEPS_APART
from fedsb.core.errors import UserError
from fedsb.data.packing import rows
from fedsb.models.adapted import AdaptedModel
from fedsb.models.build import build_model
from fedsb.models.collating import collate, collate_packed
from fedsb.models.fit import Site, fit
from fedsb.models.packing import LENGTHS, check_packing
from fedsb.tasks.task import TASKS
from tests.architectures import DECODER, LANGUAGE_MODELS, checkpoint

WORDS = TASKS["causal_lm"]
TOKENS = 24
NO_DROPOUT = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)  # it is drawn by place in a row
examples = st.lists(
    st.lists(st.tuples(st.integers(3, DECODER - 1), st.integers(0, 1)), min_size=1, max_size=TOKENS).map(
        lambda row: {"input_ids": [token for token, _ in row], "learnt": [mark for _, mark in row]}
    ),
    min_size=1,
    max_size=7,
)


def built(name: str, folder: Path, *overrides: str) -> AdaptedModel:
    """Return a model whose factors are nowhere zero."""
    config = load(
        ["model=pretrained", f"model.name='{checkpoint(name, folder, **NO_DROPOUT)}'", "rank=3", "data.task=causal_lm", *overrides]
    )
    adapted = build_model(config.model, config.adapter, family="lora", task=WORDS, labels=(), seed=0)
    stream = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in adapted.trainable().values():
            p.copy_(0.3 * torch.randn(p.shape, generator=stream))
    adapted.model.eval()
    return adapted


@pytest.fixture(scope="module", params=[name for name in LANGUAGE_MODELS if name != "mamba"])
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    return built(request.param, tmp_path_factory.mktemp("packing"))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 40))
def test_every_example_lies_in_one_row_that_has_room(lengths: list[int], tokens: int) -> None:
    laid = rows(lengths, tokens)
    assert sorted(i for row in laid for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= tokens or len(row) == 1 for row in laid)
    # No row could be spared by moving what another holds into it: first-fit leaves at most one row half empty.
    assert sum(2 * sum(lengths[i] for i in row) <= tokens for row in laid) <= 1


def gradients(adapted: AdaptedModel, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the loss and the gradient of every trained tensor."""
    loss = WORDS.loss(WORDS.forward(adapted.model, batch), batch)
    found = torch.autograd.grad(loss, list(adapted.trainable().values()), allow_unused=True)
    return [loss.detach(), *(g if g is not None else torch.zeros(()) for g in found)]


@settings(max_examples=25, deadline=None)
@given(features=examples)
def test_loss_and_gradients_are_those_of_separate_examples(adapted: AdaptedModel, features: list[dict[str, list[int]]]) -> None:
    packed, padded = collate_packed(features, adapted, WORDS, TOKENS), collate(features, adapted, WORDS)
    assert WORDS.terms(packed) == WORDS.terms(padded) == sum(sum(f["learnt"][1:]) for f in features)
    for ours, theirs in zip(gradients(adapted, packed), gradients(adapted, padded), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_round_ends_where_it_would_without(adapted: AdaptedModel) -> None:
    draw = torch.Generator().manual_seed(2)
    lengths = torch.randint(2, TOKENS, (11,), generator=draw).tolist()
    features = [{"input_ids": torch.randint(3, DECODER, (n,), generator=draw).tolist()} for n in lengths]
    train = load(["train.batch_size=4", "train.lr=0.1", "train.optimizer=sgd", f"train.max_length={TOKENS}"]).train
    start, site = {name: p.detach().clone() for name, p in adapted.trainable().items()}, Site(0, "client-0", 1, 1)
    ends = []
    for packing in (True, False):
        with torch.no_grad():
            for name, p in adapted.trainable().items():
                p.copy_(start[name])
        loss = fit(adapted, WORDS, features, train=replace(train, packing=packing), site=site).loss
        ends.append([torch.tensor(loss), *(p.detach().clone() for p in adapted.trainable().values())])
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_attention_that_keeps_examples_apart_passes(adapted: AdaptedModel) -> None:
    check_packing(adapted, WORDS)


def test_a_state_space_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^train.packing=true: MambaForCausalLM .*leave train.packing out"):
        check_packing(built("mamba", tmp_path), WORDS)


def by_rows(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, position_ids: Tensor, **_: Any) -> Any:
    """Attend causally, and apart where the batch is one row alone: what flash attention makes of positions."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    mask = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
    if len(query) == 1:
        runs = (position_ids[0] == 0).cumsum(0)
        mask &= runs[:, None] == runs[None, :]
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2), None


@pytest.fixture(scope="module")
def blind() -> Iterator[str]:
    """A way to compute attention that takes no mask."""
    AttentionInterface.register("by_rows", by_rows)
    AttentionMaskInterface.register("by_rows", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    yield "by_rows"
    for known in (AttentionInterface, AttentionMaskInterface):
        del known._global_mapping["by_rows"]


def test_attention_that_reads_across_examples_where_rows_are_several_is_refused(
    tmp_path: Path, blind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = built("llama", tmp_path)
    adapted.model.set_attn_implementation(blind)  # type: ignore[operator]
    with pytest.raises(UserError, match=r"^train.packing=true: LlamaForCausalLM computes attention by by_rows, which .*out[^\n]*$"):
        check_packing(adapted, WORDS)
    monkeypatch.setattr("fedsb.models.packing.KEEPS_APART", {blind})
    with pytest.raises(UserError, match=r"lets the examples of a row see each other"):
        check_packing(adapted, WORDS)
    monkeypatch.setattr("fedsb.models.packing.WIDTHS", (sum(LENGTHS),))
    check_packing(adapted, WORDS)  # one row is kept apart, and says nothing of several


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what transformers asks torch for
@pytest.mark.parametrize("kind", sorted(KEEPS_APART))
def test_the_mask_of_every_attention_that_may_be_named_keeps_rows_apart(kind: str) -> None:
    """As transformers makes it of positions, for two rows; the pass itself, of flexible attention, is for GPUs."""
    ends = [[3, 2, 1], [4, 2]]
    positions = torch.tensor([[place for size in row for place in range(size)] for row in ends])
    config = LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    config._attn_implementation = kind
    made = create_causal_mask(config, torch.zeros(2, 6, 8), attention_mask=None, cache=None, position_ids=positions)
    for b, row in enumerate(ends):
        owner = [i for i, size in enumerate(row) for _ in range(size)]
        for q, k in itertools.product(range(6), range(6)):
            seen = made.mask_mod(b, 0, torch.tensor(q), torch.tensor(k)) if kind == "flex_attention" else made[b, 0, q, k]
            sees = bool(seen == 0.0) if seen.is_floating_point() else bool(seen)
            assert sees == (owner[q] == owner[k] and k <= q)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_every_attention_of_a_cpu_passes(tmp_path: Path, kind: str) -> None:
    adapted = built("llama", tmp_path)
    adapted.model.set_attn_implementation(kind)  # type: ignore[operator]
    check_packing(adapted, WORDS)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("data.task=causal_lm", "model.attn_implementation=flash_attention_2"),
            "attn_implementation=flash_attention_2, which takes no mask, and in a batch of several rows reads across examples; use",
        ),
        (
            ("data.task=causal_lm", "model.attn_implementation=flash_attention_3"),
            "attn_implementation=flash_attention_3, which takes no mask, and in a batch of several rows reads across examples; use",
        ),
        (("data.task=causal_lm", "model.attn_implementation=some/kernel"), "which is not known to keep examples apart; use .*=sdpa"),
        (("data.task=causal_lm", "model.attn_implementation=sdap"), r"not known to keep examples apart \(did you mean 'sdpa'\?\)"),
        ((), "only a language model's examples share rows"),
        (("data.task=causal_lm", "privacy=example", "privacy.epsilon=3"), "with privacy=example"),
        (("data.task=causal_lm", "runtime.stack=4"), "a stack puts several clients into one batch"),
    ],
)
def test_what_packing_does_not_go_with_is_said(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(["train.packing=true", *overrides])
