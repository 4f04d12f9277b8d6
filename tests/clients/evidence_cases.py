"""What the laws of evidence share: adapted models, probes, the dense gradient by plain autograd, and a watch for tensors of its size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fedsb.adapters import SPECS, attach, layers, match_targets
from fedsb.adapters.linear import out_in
from fedsb.adapters.starts import Side
from fedsb.core.rng import torch_generator, torch_stream
from fedsb.core.state import Name, State

SIZES: dict[Side, int] = {"right": 1, "left": 0}  # the side of W0 that the probe multiplies
ROLES: dict[Side, str] = {"right": "Y", "left": "Z"}
VOCABULARY = 31
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "max_position_embeddings": 16}


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(num_attention_heads=2, num_labels=3, **SHAPE))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=24, n_layer=2, n_head=2))


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **SHAPE))


def label_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(input_ids=batch[:, :-1]).logits, batch[:, -1] % 3)


def token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(input_ids=batch).logits[:, :-1]
    return nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), batch[:, 1:].reshape(-1))


LANGUAGE_MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "bert": (bert, label_loss),
    "gpt2": (gpt2, token_loss),
    "llama": (llama, token_loss),
}


class Chain(nn.Module):
    """Two layers of one kind with a bend between; the first one's input needs no gradient."""

    def __init__(self, kind: type[nn.Module], sizes: tuple[int, int, int]) -> None:
        super().__init__()
        n, hidden, m = sizes
        # Conv1D takes (out, in), nn.Linear (in, out).
        self.first = kind(n, hidden) if kind is nn.Linear else kind(hidden, n)
        self.second = kind(hidden, m) if kind is nn.Linear else kind(m, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def square_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().sum(dim=(1, 2)).mean()


def adapt(model: nn.Module, exclude: tuple[str, ...] = ("classifier", "*pooler*", "lm_head")) -> nn.Module:
    attach(model, SPECS["lora_sb"], targets=match_targets(model, "all-linear", exclude), rank=2, scale=1.0)
    for layer in layers(model).values():
        for role in layer.spec.factors:
            # Far from zero, so that a run with adapters on would give another gradient.
            factor = layer.weight_of(role)
            factor.data = torch.randn(factor.shape, generator=torch_generator(0, "factors"))
    return model


def chain(kind: type[nn.Module], sizes: tuple[int, int, int]) -> nn.Module:
    with torch_stream(0, "chain"):
        return adapt(Chain(kind, sizes))


def built(kind: str) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    build, loss_fn = LANGUAGE_MODELS[kind]
    with torch_stream(0, "model"):
        return adapt(build()), loss_fn


def oracle(model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Tensor) -> dict[str, Tensor]:
    """Gradient of W0 (m, n) in float64 by plain autograd, over all examples at once."""
    model = copy.deepcopy(model).double().eval()
    for layer in layers(model).values():
        layer.active = False
        layer.base.weight.requires_grad_(True)
    loss_fn(model, batch.double() if batch.is_floating_point() else batch).backward()
    return {name: out_in(layer.base, layer.base.weight.grad) for name, layer in layers(model).items()}


def probes_for(model: nn.Module, side: Side, width: int = 3) -> State:
    stream = torch_generator(0, "probes")
    return State(
        {Name(name, "probe"): torch.randn(layer.shape[SIZES[side]], width, generator=stream) for name, layer in layers(model).items()}
    )


def micro(batch: Tensor, *counts: int) -> list[tuple[Tensor, int]]:
    return [(part, len(part)) for part in batch.split(counts)]


def tokens(examples: int = 6, length: int = 8) -> Tensor:
    return torch.randint(VOCABULARY, (examples, length), generator=torch_generator(0, "tokens"))


def assert_products(found: State, gradients: dict[str, Tensor], probes: State, side: Side) -> None:
    assert set(found) == {Name(name, ROLES[side]) for name in gradients}
    for name, probe in probes.items():
        g = gradients[name.module] if side == "right" else gradients[name.module].T
        wanted = g @ probe.double()
        error = (found[Name(name.module, ROLES[side])].double() - wanted).norm() / wanted.norm()
        assert error < 1e-5, (name.module, float(error))


class DenseWatch(TorchDispatchMode):
    """Collects every result as large as a gradient of an adapted layer, except views of what existed before."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sizes = {layer.shape[0] * layer.shape[1] for layer in layers(model).values()}
        self.frozen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.found: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.numel() in self.sizes and t.untyped_storage().data_ptr() not in self.frozen:
                self.found.append((str(func), tuple(t.shape)))
        return out
