"""What a configuration says of the start and the scale reaches the run: against dense gradients by autograd alone, in float64."""

from __future__ import annotations

from pathlib import Path
from shlex import join

import pytest
import torch
from torch import Tensor

from fedsb.adapters import write
from fedsb.app.asked import config_of
from fedsb.app.assembly import public_features, task_of
from fedsb.app.prepare import Prepared, prepare
from fedsb.app.threads import use_threads
from fedsb.config.schema import Config
from fedsb.core.state import Name, State
from fedsb.models.collating import collate
from tests.strategies.private_runs import small

PUBLIC = ("init.kind=gradient", "init.evidence=public", "data.public_fraction=0.3", "init.num_examples=1000", "init.micro_batch=5")
# Wide enough that the sketch of a 32 x 32 gradient is exact.
EXACT = ("init.oversample=30", "init.power_iterations=1")


def prepared(*overrides: str) -> Prepared:
    config = config_of(join(overrides))
    use_threads(config)
    return prepare(config)


def dense_gradient(found: Prepared, config: Config) -> dict[str, Tensor]:
    """Return the gradient of the mean loss over all public examples at W0, one backward pass, (out, in)."""
    adapted, task = found.adapted, task_of(config)
    adapted.reset()
    batch = collate(public_features(config), adapted, task)
    weights = {name: layer.base.weight for name, layer in adapted.layers.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    gradients = torch.autograd.grad(task.loss(task.forward(adapted.model.eval(), batch), batch), list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)
    return {name: gradient.double() for name, gradient in zip(weights, gradients, strict=True)}


def leading(matrix: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("scale", [["adapter.alpha=6"], ["adapter.alpha=6", "adapter.rslora=true"]], ids=["alpha/r", "rslora"])
def test_a_public_start_is_one_step_along_the_leading_part_of_the_dense_gradient(scale: list[str], tiny_bert: Path, tmp_path: Path) -> None:
    overrides = [*small(tiny_bert, tmp_path, *PUBLIC, *EXACT, *scale), "init.core=spectral", "init.step=0.5"]
    found = prepared(*overrides)
    s = 6 / 2**0.5 if "adapter.rslora=true" in scale else 3.0
    basis, first = found.strategy.frozen.view().basis, found.initial
    for module, gradient in dense_gradient(found, found.config).items():
        b, r, a = (state[Name(module, role)].double() for state, role in ((basis, "B"), (first, "R"), (basis, "A")))
        torch.testing.assert_close(s * b @ r @ a, -0.5 * leading(gradient, 2), rtol=0, atol=1e-4 * float(gradient.norm()))


def test_a_zero_core_starts_where_the_model_is(tiny_bert: Path, tmp_path: Path) -> None:
    found = prepared(*small(tiny_bert, tmp_path, *PUBLIC, *EXACT, "init.core=zero"))
    assert all(not t.any() for t in found.initial.pick("R").values())


def test_a_start_by_signs_takes_the_leading_part_of_the_gradients_sign(tiny_bert: Path, tmp_path: Path) -> None:
    overrides = small(tiny_bert, tmp_path, *PUBLIC, "init.update=sign", "init.core=spectral", "init.step=0.5", "adapter.alpha=6")
    found = prepared(*overrides)
    basis, first = found.strategy.frozen.view().basis, found.initial
    for module, gradient in dense_gradient(found, found.config).items():
        b, r, a = (state[Name(module, role)].double() for state, role in ((basis, "B"), (first, "R"), (basis, "A")))
        wanted = -0.5 * leading(gradient.sign(), 2)
        torch.testing.assert_close(3.0 * b @ r @ a, wanted, rtol=0, atol=1e-3 * float(wanted.norm()))


@pytest.mark.parametrize("method", ["fed_sb", "fedavg_lora"])
@pytest.mark.parametrize(("rslora", "scale"), [("false", 8.0), ("true", 16.0)])
def test_the_scale_reaches_every_layer(method: str, rslora: str, scale: float, tiny_bert: Path, tmp_path: Path) -> None:
    more = (f"method={method}", "init.kind=random", "rank=4", "adapter.alpha=32", f"adapter.rslora={rslora}", "adapter.dropout=0")
    adapted = prepared(*small(tiny_bert, tmp_path, *more)).adapted
    generator = torch.Generator().manual_seed(0)
    factors = State({name: torch.randn(shape, generator=generator) for name, shape in adapted.layouts.down.shapes if name.role != "head"})
    basis = State({
        Name(module, role): torch.randn(adapted.spec.shape(role, *layer.shape, 4), generator=generator)
        for module, layer in adapted.layers.items()
        for role in adapted.spec.in_log
    })  # fmt: skip
    write(adapted.model, basis)
    write(adapted.model, factors)
    for module, layer in adapted.layers.items():
        x = torch.randn(3, layer.shape[1], generator=generator)
        product = torch.eye(layer.shape[0], dtype=torch.float64)
        for role in adapted.spec.factors:
            product = product @ (factors if role in adapted.spec.in_state else basis)[Name(module, role)].double()
        with torch.no_grad():
            moved = (layer.eval()(x) - layer.base(x)).double()
        torch.testing.assert_close(moved, scale * x.double() @ product.T, rtol=1e-4, atol=1e-3)
