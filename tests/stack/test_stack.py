"""Clients side by side end where they end alone: over methods, privacy, kinds of layers, unequal sizes, and whatever their company."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clients.private import private_fit, private_lesson
from clients.stacked import taught_together
from fedsb.config.compose import load
from fedsb.config.schema import TrainConfig
from fedsb.core.devices import on_host
from fedsb.core.errors import UserError
from fedsb.core.state import HEAD, Name, State, squared_norm, subtract
from fedsb.models.fit import Site, dropout_of, fit, fit_lesson
from fedsb.privacy.accounting import Entry
from fedsb.privacy.randomness import Streams, simulated_streams
from fedsb.stack.stack import Part, Stack
from tests.architectures import checkpoint
from tests.clients.private_cases import TRAIN, Case, build_case, make_case, mechanism

CLIENTS = 3
PLAIN = replace(load().train, batch_size=4, bucket=2, lr=0.01, warmup=0.2, prox_mu=0.1, clip_norm=0.5, weight_decay=0.01, local_epochs=2)
KINDS = [
    ("tiny_bert", "classification", "lora"),
    ("tiny_bert", "classification", "lora_sb"),
    ("tiny_bert", "classification", "head_only"),
    ("tiny_bert", "regression", "lora_sb"),
    ("tiny_gpt2", "causal_lm", "lora"),
    ("tiny_llama", "causal_lm", "lora_sb"),
]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    """A model with its dropout on: what is drawn for one client must not depend on the others."""
    folder, task, family = request.param
    return build_case(request.getfixturevalue(folder), task, family, dropout=True)


@pytest.fixture(scope="module")
def fine(case: Case) -> Case:
    """The same in float64. Adam makes steps of equal size out of gradients that are next to nothing, float32's rounding included."""
    adapted = copy.deepcopy(case.adapted)
    adapted.model.double()
    return replace(case, adapted=adapted)


def shards(case: Case, sizes: Sequence[int]) -> list[list[dict[str, Any]]]:
    return [case.features[i : i + size] for i, size in enumerate(sizes)]


def site(client: int) -> Site:
    return Site(seed=3, client=f"client-{client}", round=2, num_rounds=3)


def plain_alone(case: Case, shard: list[dict[str, Any]], client: int, train: TrainConfig) -> tuple[State, float]:
    case.adapted.install(case.state, case.frozen)
    result = fit(case.adapted, case.task, shard, train=train, site=site(client))
    return case.adapted.trained(), result.loss


def plain_together(case: Case, parts: list[list[dict[str, Any]]], train: TrainConfig) -> list[tuple[State, float]]:
    case.adapted.install(case.state, case.frozen)
    stack = Stack(case.adapted, [dropout_of(site(i)) for i in range(len(parts))])
    lessons = {i: fit_lesson(stack.members[i], part, train=train, site=site(i)) for i, part in enumerate(parts)}
    ended = taught_together(stack, case.task, lessons, train=train)
    return [(on_host(stack.members[i]), ended[i].loss) for i in range(len(parts))]


def noise(client: int) -> Streams:
    return simulated_streams(0, f"client-{client}", 1, "train", torch.device("cpu"))


HOW = {"sigma": 0.7, "rate": 0.4, "steps": 5, "max_batch": 3}
CHARGED = Entry("gaussian", 0.4, 0.7, 5)


def private_together(case: Case, parts: list[list[dict[str, Any]]], train: TrainConfig, kind: str) -> list[tuple[State, Any]]:
    case.adapted.install(case.state, case.frozen)
    streams = [noise(i) for i in range(len(parts))]
    stack = Stack(case.adapted, [s.dropout for s in streams])

    def lesson(i: int) -> Any:
        return private_lesson(
            case.adapted,
            stack.members[i],
            lambda batch: stack.forward_of(i, lambda: case.task.forward(case.adapted.model, batch)),
            case.task,
            parts[i],
            train=train,
            site=site(i),
            mechanism=mechanism(0.5, kind=kind, **HOW),
            streams=streams[i],
            charged=CHARGED,
        )

    ended = taught_together(stack, case.task, {i: lesson(i) for i in range(len(parts))}, train=train, private=True)
    return [(on_host(stack.members[i]), ended[i]) for i in range(len(parts))]


def private_alone(case: Case, shard: list[dict[str, Any]], client: int, train: TrainConfig, kind: str) -> tuple[State, Any]:
    case.adapted.install(case.state, case.frozen)
    how = mechanism(0.5, kind=kind, **HOW)
    fit = private_fit(
        case.adapted, case.task, shard, train=train, site=site(client), mechanism=how, streams=noise(client), charged=CHARGED
    )  # fmt: skip
    return case.adapted.trained(), fit


def gap(one: State, other: State) -> float:
    """In norm, over all tensors."""
    assert list(one) == list(other)
    return (squared_norm(subtract(one, other)) / squared_norm(other)) ** 0.5


def moved(case: Case, state: State) -> bool:
    return any(not torch.equal(state[name], case.state[name]) for name in state)


@settings(max_examples=4, deadline=None)
@given(sizes=st.lists(st.integers(1, 8), min_size=2, max_size=CLIENTS), optimizer=st.sampled_from(["adamw", "sgd"]))
def test_side_by_side_is_one_after_the_other(fine: Case, sizes: list[int], optimizer: str) -> None:
    parts, train = shards(fine, sizes), replace(PLAIN, optimizer=optimizer)
    for i, (state, loss) in enumerate(plain_together(fine, parts, train)):
        alone, wanted = plain_alone(fine, parts[i], i, train)
        assert moved(fine, state)
        assert gap(state, alone) < 1e-6
        assert loss == pytest.approx(wanted, rel=1e-6)


@settings(max_examples=2, deadline=None)
@given(sizes=st.lists(st.integers(1, 8), min_size=2, max_size=CLIENTS))
def test_side_by_side_is_one_after_the_other_in_float32_too(case: Case, sizes: list[int]) -> None:
    parts, train = shards(case, sizes), replace(PLAIN, optimizer="sgd")
    for i, (state, loss) in enumerate(plain_together(case, parts, train)):
        alone, wanted = plain_alone(case, parts[i], i, train)
        assert gap(state, alone) < 1e-5
        assert loss == pytest.approx(wanted, rel=1e-5)


@settings(max_examples=2, deadline=None)
@given(sizes=st.lists(st.integers(3, 8), min_size=2, max_size=CLIENTS), kind=st.sampled_from(["flat", "per_layer", "adaptive"]))
def test_private_side_by_side_is_private_one_after_the_other(case: Case, sizes: list[int], kind: str) -> None:
    """With the self-checks on, Poisson samples of unequal size (empty ones too), physical batches, and noise of each client's own."""
    parts = shards(case, sizes)
    for i, (state, ended) in enumerate(private_together(case, parts, TRAIN, kind)):
        alone, wanted = private_alone(case, parts[i], i, TRAIN, kind)
        assert ended.steps == wanted.steps == CHARGED.steps
        assert ended.diagnostics == pytest.approx(wanted.diagnostics, rel=1e-4)
        assert gap(state, alone) < 1e-5


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A model that trains a norm without a bias in its head, as ModernBERT does."""
    case = build_case(checkpoint("modernbert", tmp_path_factory.mktemp("bare")), "classification", "head_only", dropout=True)
    norm = case.adapted.model.get_submodule("head.norm")
    assert isinstance(norm, nn.LayerNorm)
    assert norm.bias is None
    assert Name("head.norm.weight", HEAD) in case.adapted.trainable()
    return case


def test_a_norm_without_a_bias_is_trained_side_by_side(bare: Case) -> None:
    parts, train = shards(bare, [5, 3]), replace(PLAIN, optimizer="sgd")
    for i, (state, _) in enumerate(plain_together(bare, parts, train)):
        assert moved(bare, state.pick(HEAD))
        assert gap(state, plain_alone(bare, parts[i], i, train)[0]) < 1e-5


@pytest.mark.parametrize("kind", ["flat", "per_layer", "adaptive"])
def test_a_norm_without_a_bias_is_trained_privately_side_by_side(bare: Case, kind: str) -> None:
    parts = shards(bare, [7, 4])
    for i, (state, ended) in enumerate(private_together(bare, parts, TRAIN, kind)):
        alone, wanted = private_alone(bare, parts[i], i, TRAIN, kind)
        assert ended.steps == wanted.steps == CHARGED.steps
        assert gap(state, alone) < 1e-5
        norm = Name("head.norm.weight", HEAD)
        assert not torch.equal(state[norm], bare.state[norm])


def test_company_changes_nothing_but_the_last_bits(fine: Case) -> None:
    """A client beside two others, and beside one."""
    parts = shards(fine, [6, 6, 6])
    first = plain_together(fine, parts, PLAIN)[0][0]
    beside_one = plain_together(fine, parts[:2], PLAIN)[0][0]
    assert gap(first, beside_one) < 1e-6


def test_a_lesson_that_fails_costs_nobody_else(fine: Case) -> None:
    parts = shards(fine, [5, 5])
    fine.adapted.install(fine.state, fine.frozen)
    stack = Stack(fine.adapted, [dropout_of(site(i)) for i in range(2)])

    def broken() -> Any:
        yield parts[0][:2]
        raise ValueError("of its own making")

    lesson = fit_lesson(stack.members[1], parts[1], train=PLAIN, site=site(1))
    ended = taught_together(stack, fine.task, {0: broken(), 1: lesson}, train=PLAIN)
    assert isinstance(ended[0], ValueError)
    assert gap(on_host(stack.members[1]), plain_alone(fine, parts[1], 1, PLAIN)[0]) < 1e-6


def test_the_model_is_left_as_it_was(case: Case) -> None:
    case.adapted.install(case.state, case.frozen)
    before = {name: t.clone() for name, t in case.adapted.model.state_dict().items()}
    numbers = torch.get_rng_state()
    parts = shards(case, [5, 3])
    plain_together(case, parts, PLAIN)
    private_together(case, parts, TRAIN, "flat")
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(torch.equal(t, before[name]) for name, t in case.adapted.model.state_dict().items())
    assert not any("forward" in vars(module) for module in case.adapted.model.modules())
    assert not any(hasattr(p, "grad_sample") and p.grad_sample is not None for p in case.adapted.model.parameters())


def test_a_module_with_a_forward_of_its_own_is_refused(tiny_bert: Any) -> None:
    """As libraries lay one over a module's: it computes with the module's values, not with a client's."""
    case = make_case(tiny_bert, "classification", "head_only")
    stack = Stack(case.adapted, [torch.Generator() for _ in range(2)])
    module = case.adapted.model.get_submodule("classifier")
    module.forward = own = lambda x: 2 * nn.Linear.forward(module, x)  # type: ignore[method-assign, arg-type]
    try:
        with pytest.raises(UserError, match=r"'Linear' that it trains has a forward of its own, .* set runtime.stack=1$"), stack.laid():
            pass
        assert module.forward is own
    finally:
        del module.forward  # the model is the process's


def test_other_random_numbers_than_dropouts_are_refused(tiny_bert: Any) -> None:
    case = make_case(tiny_bert, "classification", "head_only")
    stack = Stack(case.adapted, [dropout_of(site(0))])

    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    with pytest.raises(UserError, match=r"draws random numbers beside its dropout.*runtime\.stack=1"), stack.among([Part(0, 1, 4)]):
        Noisy()(torch.ones(1, 4))


@pytest.mark.parametrize("family", ["lora", "lora_sb"])
@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
def test_beside_a_base_in_bfloat16_clients_end_where_they_end_alone(tiny_llama: Any, family: str, private: bool) -> None:
    """But for its rounding, which lies otherwise in a batched product."""
    case = make_case(tiny_llama, "causal_lm", family, overrides=("model.dtype=bfloat16",))
    parts = shards(case, (4, 3, 3))
    train = replace(PLAIN, prox_mu=0.0, lr=0.1, optimizer="sgd")
    if private:
        ended = private_together(case, parts, TRAIN, "flat")
        alone = [private_alone(case, part, i, TRAIN, "flat") for i, part in enumerate(parts)]
    else:
        ended, alone = plain_together(case, parts, train), [plain_alone(case, part, i, train) for i, part in enumerate(parts)]
    for (found, _), (wanted, _) in zip(ended, alone, strict=True):
        moved = subtract(wanted, State({name: case.state[name] for name in wanted}))
        assert gap(subtract(found, State({name: case.state[name] for name in wanted})), moved) < 0.05
