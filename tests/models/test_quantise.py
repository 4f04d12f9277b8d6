"""A base in 8 or 4 bits: what it holds, that its layers compute with exactly that, and that training leaves every bit of it alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clients.self_checks import fingerprint
from fedsb.adapters import SPECS
from fedsb.adapters.linear import base_weight
from fedsb.adapters.merging import merged_copy
from fedsb.adapters.quantised import QuantisedLinear, is_quantised, stored
from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.core.state import sha256
from fedsb.models.adapted import AdaptedModel
from fedsb.models.fit import fit
from fedsb.models.quantise import KINDS
from fedsb.models.spread import held_bytes
from fedsb.stack.stack import Stack
from fedsb.tasks.task import TASKS
from tests.clients.private_cases import build_case, mechanism
from tests.clients.private_cases import fit as private_fit
from tests.core.test_devices import Crossings
from tests.models.test_narrow import SITE, built, flat, gradients, texts
from tests.models.test_spread import CPU, META, over_two

ERRORS = {"int8": 0.01, "int4": 0.15, "nf4": 0.11, "fp4": 0.15}  # relative, of random weights
TRAIN = replace(load().train, local_steps=3, batch_size=4, lr=0.01)


def lacks(kind: str) -> bool:
    return find_spec(KINDS[kind].package) is None


def of(kind: str) -> Any:
    return pytest.param(kind, marks=pytest.mark.skipif(lacks(kind), reason=f"{KINDS[kind].package} is not installed"))


every = pytest.mark.parametrize("kind", [of(kind) for kind in KINDS])
# fp4 is nf4 with other values.
each = pytest.mark.parametrize("kind", [of(kind) for kind in KINDS if kind != "fp4"])


def quantised(folder: Path, kind: str, family: str = "lora", dtype: str = "bfloat16", task: str = "causal_lm") -> AdaptedModel:
    return built(folder, task, family, f"model.quantize={kind}", dtype=dtype)


def bits(adapted: AdaptedModel) -> list[Tensor]:
    factors = {id(layer.weight_of(role)) for layer in adapted.layers.values() for role in layer.spec.factors}
    return [t.detach().clone() for p in adapted.model.parameters() if id(p) not in factors for t in stored(p)]


@pytest.mark.parametrize("kind", KINDS)
def test_without_its_package_it_is_one_line(tiny_llama: Path, kind: str) -> None:
    if not lacks(kind):
        pytest.skip("its package is installed")
    with pytest.raises(UserError, match=rf"^model\.quantize={kind} needs {KINDS[kind].package}, [^\n]*fedsb\[quant\][^\n]*$"):
        quantised(tiny_llama, kind)


@each
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_it_holds_in_few_bits_cannot_be_trained(tiny_llama: Path, kind: str, dtype: str) -> None:
    said = rf"^model\.quantize={kind} holds \d+ of the parameters that are to be trained \('model\..*'\), and cannot learn them; use "
    with pytest.raises(UserError, match=said):
        built(tiny_llama, "causal_lm", "head_only", f"model.quantize={kind}", 'model.head="*"', dtype=dtype)


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_hold_so_many_bits_and_compute_with_what_they_hold(tiny_llama: Path, kind: str, dtype: str) -> None:
    adapted, plain = quantised(tiny_llama, kind, dtype=dtype), built(tiny_llama, "causal_lm", dtype="float32")
    assert adapted.layers.keys() == plain.layers.keys()
    for name, layer in adapted.layers.items():
        fits = kind != "int4" or layer.shape[1] % 32 == 0
        assert isinstance(layer.base, QuantisedLinear) == is_quantised(layer.base.weight) == fits
        if not fits:
            continue
        whole = base_weight(plain.layers[name].base)
        held = base_weight(layer.base)
        assert (held.dtype, held.shape) == (torch.float32, whole.shape)
        assert float((held - whole).norm() / whole.norm()) < ERRORS[kind]
        integers = next(t for t in stored(layer.base.weight) if t.dtype in (torch.int8, torch.uint8))
        assert 8 * integers.nbytes == KINDS[kind].bits * whole.numel()
        x = torch.randn(5, layer.shape[1], requires_grad=True).to(getattr(torch, dtype))
        assert torch.equal(layer.base(x), F.linear(x, held.to(x.dtype)))


@each
def test_gradients_are_those_of_the_dequantised_base(tiny_llama: Path, kind: str) -> None:
    adapted = quantised(tiny_llama, kind, dtype="float32")
    plain = copy.deepcopy(adapted)
    for layer in plain.layers.values():
        if isinstance(layer.base, QuantisedLinear):
            layer.base = layer.base.plain()
    assert torch.allclose(flat(gradients(adapted, "causal_lm")), flat(gradients(plain, "causal_lm")), rtol=1e-4, atol=1e-7)


@each
@pytest.mark.parametrize("family", [name for name, spec in SPECS.items() if spec.factors])
def test_training_leaves_every_bit_of_the_base_alone(tiny_llama: Path, kind: str, family: str) -> None:
    adapted = quantised(tiny_llama, kind, family)
    before, marked, start = bits(adapted), fingerprint(adapted), adapted.trained()
    fit(adapted, TASKS["causal_lm"], texts(), train=TRAIN, site=SITE)
    assert sha256(adapted.trained()) != sha256(start)
    assert all(torch.equal(a, b) for a, b in zip(before, bits(adapted), strict=True))
    assert fingerprint(adapted) == marked
    adapted.reset()
    assert all(torch.equal(a, b) for a, b in zip(before, bits(adapted), strict=True))


@each
def test_starts_are_of_the_dequantised_weights(tiny_llama: Path, kind: str) -> None:
    adapted = quantised(tiny_llama, kind, "lora_sb")
    wanted = SPECS["lora_sb"].starts["weight_svd"]({n: base_weight(layer.base) for n, layer in adapted.layers.items()}, 2, 0)
    assert sha256(SPECS["lora_sb"].starts["weight_svd"](adapted.weights(), 2, 0)) == sha256(wanted)


@each
def test_private_training_passes_its_self_checks(tiny_llama: Path, kind: str) -> None:
    case = build_case(tiny_llama, "causal_lm", "lora_sb", overrides=("model.dtype=bfloat16", f"model.quantize={kind}"))
    assert private_fit(case, mechanism(0.5, sigma=1.0, rate=0.4, steps=2, max_batch=4), check=True).steps == 2


@each
def test_a_merged_copy_is_plain_and_says_the_same(tiny_llama: Path, kind: str) -> None:
    adapted = quantised(tiny_llama, kind, dtype="float32")
    merged = merged_copy(adapted.model).eval()
    assert not any(is_quantised(p) for p in merged.parameters())
    ids = torch.tensor([[5, 9, 7, 11]])
    adapted.model.eval()
    assert torch.allclose(merged(ids).logits, adapted.model(ids).logits, atol=1e-5)


@each
def test_clients_side_by_side_share_it(tiny_llama: Path, kind: str) -> None:
    adapted = quantised(tiny_llama, kind)
    stack = Stack(adapted, [torch.Generator() for _ in range(2)])
    ids = torch.tensor([[5, 9, 7, 11]])
    adapted.model.eval()
    alone = adapted.model(ids).logits
    for client in range(2):
        assert torch.allclose(stack.forward_of(client, lambda: adapted.model(ids).logits), alone, rtol=2**-6, atol=2**-6)


@each
def test_a_model_without_such_layers_is_refused(tiny_gpt2: Path, kind: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.quantize={kind} finds no linear layer that it can hold in GPT2LMHeadModel; "):
        quantised(tiny_gpt2, kind)


@each
def test_what_is_added_stands_beside_it_as_factors(tiny_llama: Path, kind: str) -> None:
    """No integer can take a residual, and none is touched: W0 comes back bit for bit."""
    adapted = quantised(tiny_llama, kind, dtype="float32")
    before = bits(adapted)
    for layer in adapted.layers.values():
        if not isinstance(layer.base, QuantisedLinear):
            continue
        m, n = layer.shape
        x, added = torch.randn(3, n), 0.01 * torch.randn(m, 2) @ torch.randn(2, n)
        plain = layer.base(x)
        layer.active = False
        layer.set_residual(added)
        assert torch.allclose(layer(x), plain + x @ added.T, atol=1e-5)
        layer.set_residual(None)
        assert torch.equal(layer(x), plain)
    assert all(torch.equal(a, b) for a, b in zip(before, bits(adapted), strict=True))


@each
def test_over_several_devices_it_counts_by_its_bits_and_keeps_them(tiny_llama: Path, kind: str) -> None:
    adapted, whole = quantised(tiny_llama, kind, dtype="float32"), built(tiny_llama, "causal_lm", "lora", dtype="float32")
    saved = sum(p.nbytes for p in whole.model.parameters() if not p.requires_grad) - sum(
        t.nbytes for p in adapted.model.parameters() if not p.requires_grad for t in stored(p)
    )
    assert held_bytes(whole.model) - held_bytes(adapted.model) == saved > 0
    adapted.model.eval()
    before, said = bits(adapted), adapted.model(torch.tensor([[5, 9, 7, 11]])).logits
    with Crossings():
        there = over_two(adapted, META)
    for layer in there.layers.values():
        assert {t.device for p in layer.parameters() for t in stored(p)} == {layer.frozen.weight.device}
        assert layer.frozen.pristine.device == layer.frozen.weight.device
    assert {layer.frozen.weight.device for layer in there.layers.values()} == {CPU, META}
    apart = over_two(adapted)
    assert all(torch.equal(a, b) for a, b in zip(before, bits(apart), strict=True))
    assert torch.equal(apart.model(torch.tensor([[5, 9, 7, 11]])).logits, said)
