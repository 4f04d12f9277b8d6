"""The hooks' products against the dense float64 gradient that autograd gives, and against what they must not touch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from clients.evidence import dense_gradients, sketch_gradients
from fedsb.adapters import SPECS, attach, layers, match_targets
from fedsb.adapters.linear import out_in
from fedsb.adapters.starts import SIDES, Side, Sketch
from fedsb.core.rng import torch_generator, torch_stream
from fedsb.core.state import Name, State, WeightedSum

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


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([nn.Linear, Conv1D]),
    side=st.sampled_from(["right", "left"]),
    sizes=st.tuples(*[st.integers(2, 12)] * 3),
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    length=st.integers(1, 4),
    width=st.integers(1, 5),
)
def test_product_equals_dense_gradient_times_probe(
    kind: type[nn.Module], side: Side, sizes: tuple[int, int, int], counts: list[int], length: int, width: int
) -> None:
    model = chain(kind, sizes)
    batch = torch.randn(sum(counts), length, sizes[0], generator=torch_generator(0, "batch"))
    probes = probes_for(model, side, width)
    found = sketch_gradients(model, micro(batch, *counts), square_loss, probes=probes, side=side)
    assert_products(found, oracle(model, square_loss, batch), probes, side)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_product_on_language_models(kind: str, side: Side) -> None:
    model, loss_fn = built(kind)
    batch, probes = tokens(), probes_for(model, side)
    found = sketch_gradients(model, micro(batch, 1, 3, 2), loss_fn, probes=probes, side=side)
    assert_products(found, oracle(model, loss_fn, batch), probes, side)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_dense_gradients_equal_autograd(kind: str) -> None:
    model, loss_fn = built(kind)
    found = dense_gradients(model, micro(tokens(), 4, 2), loss_fn)
    for name, wanted in oracle(model, loss_fn, tokens()).items():
        assert (found[Name(name, "G")].double() - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("side", ["right", "left"])
def test_mean_of_clients_sketches_is_the_sketch_of_their_mean_gradient(side: Side) -> None:
    model, loss_fn = built("bert")
    batch, probes = tokens(9), probes_for(model, side)
    mean = WeightedSum()
    for part, count in micro(batch, 2, 6, 1):
        mean.add(sketch_gradients(model, [(part, count)], loss_fn, probes=probes, side=side), count)
    assert_products(mean.mean(), oracle(model, loss_fn, batch), probes, side)


@pytest.mark.parametrize("power_iterations", [0, 1])
def test_federated_sketch_equals_dense_svd_where_rank_allows(power_iterations: int) -> None:
    """Three clients with five tokens in all, so no gradient has a rank above 5 = r."""
    model = chain(nn.Linear, (17, 11, 14))
    batch = torch.randn(5, 1, 17, generator=torch_generator(0, "batch"))
    sketch = Sketch(rank=5, oversample=2, power_iterations=power_iterations, seed=0)
    probes = sketch.probes({name: layer.shape for name, layer in layers(model).items()})
    for exchange in sketch.exchanges:
        mean = WeightedSum()
        for part, count in micro(batch, 1, 2, 2):
            mean.add(sketch_gradients(model, [(part, count)], square_loss, probes=probes, side=SIDES[exchange]), count)
        last, probes = probes, sketch.basis(mean.mean())
    start = sketch.finish(mean.mean(), last)
    for name, g in oracle(model, square_loss, batch).items():
        b, a = start[Name(name, "B")].double(), start[Name(name, "A")].double()
        assert (b.T @ g @ a.T).square().sum() >= (1 - 1e-6) * g.square().sum()
        u, s, vt = torch.linalg.svd(g, full_matrices=False)
        kept = int((s > 1e-4 * s[0]).sum())
        assert torch.allclose(b @ b.T @ u[:, :kept], u[:, :kept], atol=1e-4)
        assert torch.allclose(a.T @ a @ vt[:kept].T, vt[:kept].T, atol=1e-4)


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


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_no_tensor_of_the_gradients_size_is_made(kind: str, side: Side) -> None:
    model, loss_fn = built(kind)
    probes, batches = probes_for(model, side), micro(tokens(4, 7), 3, 1)
    with DenseWatch(model) as watch:
        sketch_gradients(model, batches, loss_fn, probes=probes, side=side)
    assert watch.found == []


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_the_watch_sees_a_dense_gradient(kind: str) -> None:
    model, loss_fn = built(kind)
    with DenseWatch(model) as watch:
        dense_gradients(model, micro(tokens(4, 7), 3, 1), loss_fn)
    assert {shape for _, shape in watch.found} >= {layer.shape for layer in layers(model).values()}


@pytest.fixture
def model() -> nn.Module:
    return built("bert")[0]


def test_model_and_global_generator_are_left_as_found(model: nn.Module) -> None:
    model.train()
    model.bert.embeddings.eval()
    modes = [module.training for module in model.modules()]
    model.classifier.weight.requires_grad_(True)
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    before = torch.get_rng_state()
    first = sketch_gradients(model, micro(tokens(), 6), label_loss, probes=probes_for(model, "right"), side="right")
    again = sketch_gradients(model, micro(tokens(), 6), label_loss, probes=probes_for(model, "right"), side="right")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(before, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert trainable == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(layer.active and not layer.base._forward_hooks for layer in layers(model).values())


def test_model_is_restored_when_the_loss_fails(model: nn.Module) -> None:
    def fail(model: nn.Module, batch: Tensor) -> Tensor:
        raise RuntimeError("no loss")

    model.train()
    with pytest.raises(RuntimeError, match="no loss"):
        sketch_gradients(model, micro(tokens(), 6), fail, probes=probes_for(model, "left"), side="left")
    assert model.training
    assert all(layer.active and not layer.base._forward_hooks for layer in layers(model).values())


def test_bfloat16_weights_give_float32_products(model: nn.Module) -> None:
    probes = probes_for(model, "right")
    wanted = sketch_gradients(model, micro(tokens(), 6), label_loss, probes=probes, side="right")
    found = sketch_gradients(model.bfloat16(), micro(tokens(), 6), label_loss, probes=probes, side="right")
    for name, t in found.items():
        assert t.dtype == torch.float32
        assert (t - wanted[name]).norm() < 0.2 * wanted[name].norm()


def test_probes_of_other_layers_are_refused(model: nn.Module) -> None:
    probes = State({Name("elsewhere", "P"): torch.ones(24, 2)})
    with pytest.raises(ValueError, match=r"probes for \['elsewhere'\] don't fit the adapted layers"):
        sketch_gradients(model, micro(tokens(), 6), label_loss, probes=probes, side="right")


def test_no_examples_and_a_loss_without_adapted_layers_are_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="at least one example"):
        dense_gradients(model, [], label_loss)
    with pytest.raises(ValueError, match="depends on no adapted layer"):
        dense_gradients(model, micro(tokens(), 6), lambda model, batch: torch.ones(()))


def test_an_input_changed_in_place_is_refused() -> None:
    class Overwriting(Chain):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.first(x)
            x.zero_()
            return self.second(torch.tanh(y))

    model = adapt(Overwriting(nn.Linear, (5, 4, 3)))
    with pytest.raises(RuntimeError, match="changes the input of 'first' in place"):
        sketch_gradients(model, micro(torch.ones(2, 3, 5), 2), square_loss, probes=probes_for(model, "left"), side="left")


class Written(nn.Module):
    """Divides a view of what its first layer gives, in place; the layer sees a constant alone, as relative positions are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)
        self.register_buffer("constant", torch.randn(2, 5, generator=torch_generator(0, "constant")))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(self.constant)
        y.view(2, 2, 2)[:] /= 3.0
        return self.second(torch.tanh(y) + x)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_model_may_write_into_a_view_of_what_a_layer_gives(side: Side) -> None:
    with torch_stream(0, "written"):
        model = adapt(Written())
    batch = torch.randn(3, 2, 4, generator=torch_generator(0, "batch"))
    probes = probes_for(model, side)
    found = sketch_gradients(model, micro(batch, 1, 2), square_loss, probes=probes, side=side)
    assert_products(found, oracle(model, square_loss, batch), probes, side)
