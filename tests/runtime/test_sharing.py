"""A network that was taken apart and put together is the same one, bit for bit, around memory that it does not own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fedsb.config.compose import load
from fedsb.core.networks import use_networks
from fedsb.core.state import LINE, Name, State
from fedsb.models.build import build_model
from fedsb.models.loading import load_network
from fedsb.runtime.sharing import Parts, join, split
from fedsb.tasks.task import TASKS
from fedsb.wire.frozen import FrozenView

TEXT = torch.tensor([[2, 5, 6, 7, 3], [2, 9, 3, 0, 0]])


def network(folder: Path, task: str = "classification") -> nn.Module:
    return load_network(load(["model=pretrained", f"model.name={folder}"]).model, TASKS[task], ("a", "b"), 0, "cpu")


def logits(of: nn.Module) -> torch.Tensor:
    return of(input_ids=TEXT, attention_mask=(TEXT != 0).long()).logits.detach()


@pytest.mark.parametrize(("folder", "task"), [("tiny_bert", "classification"), ("tiny_gpt2", "causal_lm"), ("tiny_llama", "causal_lm")])
def test_it_computes_the_same_and_lies_as_it_lay(folder: str, task: str, request: pytest.FixtureRequest) -> None:
    before = network(request.getfixturevalue(folder), task)
    after = join(split(before))
    assert torch.equal(logits(before), logits(after))
    tensors = [dict([*net.named_parameters(), *net.named_buffers()]) for net in (before, after)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        other = tensors[1][name]
        assert torch.equal(tensor, other)
        assert (tensor.dtype, type(tensor)) == (other.dtype, type(other))
        if tensor.is_contiguous():
            assert tensor.data_ptr() % LINE == other.data_ptr() % LINE
    assert not after.training


def test_weights_that_are_tied_stay_tied(tiny_gpt2: Path) -> None:
    model = network(tiny_gpt2, "causal_lm")
    assert model.lm_head.weight is model.transformer.wte.weight
    parts = split(model)
    again = join(parts)
    assert again.lm_head.weight is again.transformer.wte.weight
    distinct = sum(parameter.nbytes for parameter in model.parameters())
    assert distinct <= parts.memory.nbytes <= distinct + sum(buffer.nbytes for buffer in model.buffers()) + 2 * LINE * 100


def test_the_memory_is_not_copied(tiny_bert: Path) -> None:
    parts = split(network(tiny_bert))
    one, two = join(parts), join(parts)
    begin, end = parts.memory.ctypes.data, parts.memory.ctypes.data + parts.memory.nbytes
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert a.data_ptr() == b.data_ptr()
        assert begin <= a.data_ptr() < end


@pytest.mark.parametrize("method", ["fed_sb", "fedavg_lora", "head_only"])
def test_training_writes_to_nothing_that_is_shared(method: str, tiny_bert: Path) -> None:
    """In memory that is mapped read-only a write would end the process; here it would change the parts."""
    config = load(["model=pretrained", f"model.name={tiny_bert}", f"method={method}", "rank=2"])
    parts: list[Parts] = []

    def shared(key: str, make: object) -> nn.Module:
        parts.append(split(make()))  # type: ignore[operator]
        return join(parts[0])

    use_networks(shared)
    try:
        adapted = build_model(
            config.model, config.adapter, family=config.method.adapter, task=TASKS["classification"], labels=("a", "b"), seed=0
        )
    finally:
        use_networks(None)
    before = parts[0].memory.copy()
    optimizer = torch.optim.SGD(adapted.trainable().values(), lr=1.0)
    adapted.model.train()
    adapted.model(input_ids=TEXT, attention_mask=(TEXT != 0).long()).logits.square().sum().backward()
    optimizer.step()
    adapted.install(adapted.trained(), FrozenView())
    adapted.reset()
    assert (parts[0].memory == before).all()


def test_frozen_factors_are_held_and_not_copied(tiny_bert: Path) -> None:
    config = load(["method=fed_sb", "rank=4", "model=pretrained", f"model.name={tiny_bert}"])
    adapted = build_model(config.model, config.adapter, family="lora_sb", task=TASKS["classification"], labels=("a", "b"), seed=0)
    before = {name: module.A.weight for name, module in adapted.layers.items()}
    assert {weight.untyped_storage().nbytes() for weight in before.values()} == {4}, "zeros that wait for their factors weigh nothing"
    basis = State({Name(name, "A"): torch.randn(weight.shape) for name, weight in before.items()})
    adapted.install(adapted.initial, FrozenView(basis))
    assert {layer.A.weight.data_ptr() for layer in adapted.layers.values()} == {t.data_ptr() for t in basis.values()}
    adapted.install(adapted.initial, FrozenView(basis.map(lambda t: t.t().contiguous().t())))
    assert all(layer.A.weight.is_contiguous() and layer.A.weight.data_ptr() % LINE == 0 for layer in adapted.layers.values())
    with pytest.raises(ValueError, match=r"A is \(2, 7\), expected"):
        next(iter(adapted.layers.values())).hold("A", torch.zeros(2, 7))
    next(iter(adapted.layers.values())).hold("A", torch.zeros(2, basis[next(iter(basis))].shape[1]))  # of rank 2
    adapted.reset()
    assert not any(layer.A.weight.any() or layer.B.weight.any() for layer in adapted.layers.values())
