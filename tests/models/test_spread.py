"""A network over several devices computes what it computes on one, and each of its operations meets tensors of one device alone.

There is no second device here. For values the CPU stands in for both: all hooks are on, and the cut is real. For devices ``meta`` is the
second one, on which torch refuses what lies elsewhere; tensors there have no values, and what comes back from it has zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clients import give_evidence
from fedsb.adapters.merging import merged_copy
from fedsb.adapters.residual import Residual
from fedsb.adapters.starts import Sketch
from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.core.state import State, sha256
from fedsb.data import tokenise
from fedsb.data.examples import Examples
from fedsb.models import loading
from fedsb.models import spread as module
from fedsb.models.adapted import AdaptedModel
from fedsb.models.backward import Backward
from fedsb.models.build import build_model, forget_models
from fedsb.models.evaluate import evaluate
from fedsb.models.fit import Site, fit
from fedsb.models.spread import held_bytes, spread, stacks_of
from fedsb.tasks.task import TASKS, Task
from fedsb.wire.frozen import FrozenView
from tests.architectures import LANGUAGE_MODELS, checkpoint
from tests.clients.private_cases import Case, build_case
from tests.core.test_devices import Crossings
from tests.strategies.federations import classification, federate
from tests.tasks.test_generation import asked as answered
from tests.tasks.test_generation import prompts, spirited

CPU, META = torch.device("cpu"), torch.device("meta")
KINDS = [("tiny_bert", "classification"), ("tiny_llama", "causal_lm"), ("tiny_gpt2", "causal_lm")]
SITE = Site(seed=3, client="client-1", round=1, num_rounds=2)
TRAIN = replace(load().train, batch_size=3, local_steps=3, clip_norm=0.5, prox_mu=0.1, lr=0.01)
TEXTS = ("the old bank said a new price of the market", "a film")
HEAD, WORDS = TASKS["classification"], TASKS["causal_lm"]


def cut_in_two(network: nn.Module, second: torch.device = CPU) -> nn.Module:
    """Spread a network over two devices, of which each is too small for all of it."""
    assert "over several GPUs" in spread(network, [CPU, second], too_small_for(network))
    return network


def too_small_for(network: nn.Module) -> list[int]:
    """Return the room of two devices such that a network has layers on both, or on the second one where it has one layer."""
    room = int(1.1 * held_bytes(network))
    return [room, room if sum(map(len, stacks_of(network))) > 1 else 10 * room]


def over_two(adapted: AdaptedModel, second: torch.device = CPU) -> AdaptedModel:
    made = copy.deepcopy(adapted)
    cut_in_two(made.model, second)
    return made


def grown(case: Case) -> FrozenView:
    """Return the frozen part of a case with something added to each weight."""
    draw = torch.Generator().manual_seed(9)
    residuals = {}
    for name, (m, n) in case.adapted.shapes.items():
        residuals[name] = Residual(m, n)
        residuals[name].add(1, 0.1 * torch.randn(m, 2, generator=draw), torch.randn(2, n, generator=draw))
    return FrozenView(case.frozen.basis, residuals)


@pytest.mark.parametrize(("family", "dtype"), [("lora", "float32"), ("lora_sb", "bfloat16")])
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_a_round_ends_with_the_bits_that_it_ends_with_on_one_device(
    request: pytest.FixtureRequest, kind: tuple[str, str], family: str, dtype: str
) -> None:
    case = build_case(request.getfixturevalue(kind[0]), kind[1], family, dropout=True, overrides=(f"model.dtype={dtype}",))
    task, frozen, found = case.task, grown(case), []
    assert dtype == "float32" or case.adapted.held_as_factors
    features = case.features if task is HEAD else [{"input_ids": row["input_ids"]} for row in case.features]
    # Copies both: the last bits depend on how weights lie in memory, and those of a file lie anyhow.
    for adapted in (copy.deepcopy(case.adapted), over_two(case.adapted)):
        adapted.install(case.state, frozen)
        before = adapted.trained()
        loss = fit(adapted, task, features, train=replace(TRAIN, gradient_checkpointing=True), site=SITE).loss
        after = adapted.trained()
        metrics = evaluate(adapted, task, features, train=TRAIN)
        adapted.reset()
        found.append((sha256(before), loss, sha256(after), metrics, sha256(adapted.trained())))
        assert sha256(before) == sha256(case.state.pick(*{name.role for name in before}))
        assert sha256(before) != sha256(after)
    assert found[0] == found[1]


def test_evidence_for_a_start_is_the_same(tiny_llama: Path) -> None:
    case = build_case(tiny_llama, "causal_lm", "lora_sb")
    sketch = Sketch(rank=2, oversample=2, power_iterations=0, seed=0)
    whole, apart = (
        give_evidence(adapted, WORDS, case.features, sketch=sketch, stage="range", probes=State(), micro_batch=4)
        for adapted in (copy.deepcopy(case.adapted), over_two(case.adapted))
    )
    assert sha256(whole) == sha256(apart)
    assert {name: t.shape for name, t in case.adapted.weights().items()} == case.adapted.shapes


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "mamba"])
def test_responses_are_the_same(name: str, tmp_path: Path) -> None:
    adapted = spirited(checkpoint(name, tmp_path))
    rows = prompts(5, 3)
    whole = answered(adapted, rows)
    assert answered(over_two(adapted), rows) == whole
    assert len({tuple(row) for row in whole}) > 1


def test_what_is_merged_has_the_same_weights(tiny_llama: Path) -> None:
    case = build_case(tiny_llama, "causal_lm", "lora")
    made = []
    for adapted in (case.adapted, over_two(case.adapted)):
        adapted.install(case.state, grown(case))
        made.append(merged_copy(adapted.model).state_dict())
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(t, made[1][name]) for name, t in made[0].items())


def test_a_run_has_the_bits_of_one_device(tiny_bert: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path))
    overrides = [*classification(tiny_bert, tiny_csv), "method=fedex_lora", "federation.num_rounds=2"]
    overrides = [change for change in overrides if not change.startswith("device=")]
    whole = federate(overrides)
    with two_cards(monkeypatch):
        apart = federate([*overrides, "model.device_map=auto"])
    assert any("over several GPUs" in remark for remark in apart.prepared.adapted.remarks)
    assert apart.sha256 == whole.sha256
    assert [record.metrics for record in apart.records] == [record.metrics for record in whole.records]


@contextmanager
def two_cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have two places on the CPU pass for GPUs, neither of which holds the whole model."""
    spread_for_real = module.spread
    forget_models()
    with monkeypatch.context() as patch:
        for each in (loading, module):
            patch.setattr(each, "is_spread", lambda model, device: model.device_map is not None)
        patch.setattr(module, "cards_from", lambda device: [CPU, CPU])
        patch.setattr(module, "free_on", lambda cards: [0] * len(cards))
        patch.setattr(module, "spread", lambda network, cards, _: spread_for_real(network, cards, too_small_for(network)))
        yield
    forget_models()


# One of each kind of body: what goes between its layers, and beside them.
BODIES = ("bert", "distilbert", "albert", "deberta", "mpnet", "modernbert", "t5", "bart", "gpt2", "llama")
CASES = [*((name, HEAD) for name in BODIES), *((name, WORDS) for name in LANGUAGE_MODELS)]


@pytest.mark.parametrize(("name", "task"), CASES, ids=[f"{name}-{task.name}" for name, task in CASES])
def test_no_operation_meets_tensors_of_two_devices(name: str, task: Task, tmp_path: Path) -> None:
    """Its factors and residuals included, in both passes; batches, outputs and the loss are on the first device."""
    config = load(["model=pretrained", f"model.name='{checkpoint(name, tmp_path)}'", "rank=2", f"data.task={task.name}"])
    adapted = build_model(config.model, config.adapter, family="lora", task=task, labels=("a", "b", "c"), seed=0)
    assert adapted.tokenizer is not None
    labels = [{"target": i} for i in range(2)] if task is HEAD else [{}, {}]
    features = [dict(row) | label for row, label in zip(tokenise(Examples(TEXTS), adapted.tokenizer, 32), labels, strict=True)]
    with Crossings():
        cut_in_two(adapted.model, META)
        assert {p.device for p in adapted.model.parameters()} == {CPU, META}
        beside = {name: torch.ones(shape) for name, shape in adapted.shapes.items()}
        adapted.install(adapted.initial, FrozenView(residuals={name: Residual.of(t) for name, t in beside.items()}))
        trained = adapted.trainable()
        adapted.model.train()
        loss = Backward(adapted, task, replace(TRAIN, optimizer="sgd"))(features)
        assert loss.device == adapted.device == CPU
        assert all(p.grad is not None and p.grad.device == p.device for p in trained.values())
        adapted.model.eval()
        assert evaluate(adapted, task, features, train=TRAIN).keys() >= {"loss"}
        assert {name: t.shape for name, t in adapted.trained().items()} == {name: p.shape for name, p in trained.items()}
    for layer in adapted.layers.values():
        assert {p.device for p in layer.parameters()} == {layer.frozen.pristine.device}


def test_a_round_goes_down_and_up_in_one_copy_for_each_device(tiny_llama: Path) -> None:
    case = build_case(tiny_llama, "causal_lm", "lora_sb")
    with Crossings():
        adapted = over_two(case.adapted, META)
        adapted.install(case.state, case.frozen)
    with Crossings() as crossings:
        adapted.install(case.state, case.frozen)
        adapted.trained()
    assert (crossings.down, crossings.up) == (1, 1)


def test_a_layer_that_recomputes_is_given_its_input_on_its_own_device(tiny_llama: Path) -> None:
    """From there torch tells whose generator dropout is drawn from, and draws the same again."""
    case = build_case(tiny_llama, "causal_lm", "lora")
    met: list[tuple[torch.device, torch.device]] = []
    with Crossings():
        adapted = over_two(case.adapted, META)
        (stack,) = stacks_of(adapted.model)
        for layer in stack:
            own = next(layer.parameters()).device

            def meets(module: nn.Module, args: Any, own: torch.device = own) -> None:
                met.append((args[0].device, own))

            layer.register_forward_pre_hook(meets, prepend=True)
        adapted.model(input_ids=torch.tensor([[5, 6, 7]]))
    assert met == [(CPU, CPU), (META, META)]


def test_where_one_device_holds_it_all_it_lies_there_whole(tiny_llama: Path) -> None:
    case = build_case(tiny_llama, "causal_lm", "lora")
    network = copy.deepcopy(case.adapted.model)
    before = [len(each._forward_pre_hooks) for each in network.modules()]
    assert spread(network, [META, CPU], [2 * held_bytes(network), 0]) == "model.device_map=auto: the model fits one GPU, and lies on meta"
    assert {p.device for p in network.parameters()} == {META}
    assert [len(each._forward_pre_hooks) for each in network.modules()] == before


def test_what_is_held_counts_gradients_and_moments_of_what_learns_and_factors_that_are_yet_to_come(tiny_llama: Path) -> None:
    config = load(["model=pretrained", f"model.name='{tiny_llama}'", "rank=2", "model.dtype=bfloat16"])
    adapted = build_model(config.model, config.adapter, family="lora_sb", task=WORDS, labels=(), seed=0)
    base = sum(layer.frozen.weight.numel() for layer in adapted.layers.values())
    factors = {role: sum(layer.weight_of(role).numel() for layer in adapted.layers.values()) for role in ("A", "R", "B")}
    (stack,) = stacks_of(adapted.model)
    norms = sum(p.numel() for layer in stack for name, p in layer.named_parameters() if "norm" in name)
    expected = 2 * (base + norms) + 4 * (factors["A"] + factors["B"]) + 16 * factors["R"]
    assert sum(map(held_bytes, stack)) == expected


def test_a_network_that_mixes_its_layers_is_refused_in_one_line(tiny_llama: Path) -> None:
    case = build_case(tiny_llama, "causal_lm", "lora")
    network = copy.deepcopy(case.adapted.model)
    (stack,) = stacks_of(network)
    kept: list[Tensor] = []
    stack[1].register_forward_pre_hook(lambda layer, args: kept.append(args[0]))
    network.model.norm.register_forward_pre_hook(lambda norm, args: (args[0] + kept[0],))  # type: ignore[union-attr, operator]
    with Crossings(), pytest.raises(UserError, match=r"^model\.device_map=auto: LlamaForCausalLM does not compute with [^\n]*$"):
        cut_in_two(network, META)


def test_without_gpus_it_lies_whole_and_says_so(tiny_llama: Path) -> None:
    case = build_case(tiny_llama, "causal_lm", "lora", overrides=("model.device_map=auto",))
    assert "model.device_map=auto: on a CPU the model lies whole" in case.adapted.remarks
    assert case.adapted.device == CPU
