"""AdamW with its moments in 8 bits: what it keeps, and how near it stays to AdamW."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedsb.config.compose import load
from fedsb.core.rng import torch_generator
from fedsb.models.abilities import check_abilities
from fedsb.models.fit import OPTIMIZERS, fit
from fedsb.tasks.task import TASKS
from tests.clients.private_cases import build_case, mechanism
from tests.clients.private_cases import fit as private_fit
from tests.models.test_narrow import SITE, built, flat, texts

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
TRAIN = replace(load().train, lr=0.01, weight_decay=0.1)
LARGE, SMALL = (64, 96), (8, 8)  # bitsandbytes leaves moments of fewer than 4,096 values in float32


def stepped(kind: str, shape: tuple[int, int], *, turned: bool = False, steps: int = 20) -> tuple[Tensor, torch.optim.Optimizer]:
    """Take steps towards a fixed matrix, with noise; ``turned`` lays the gradients out by columns."""
    generator = torch_generator(0, "steps")
    goal = torch.randn(shape, generator=generator)
    p = nn.Parameter(torch.zeros(shape))
    optimizer = OPTIMIZERS[kind]([p], TRAIN)
    for _ in range(steps):
        grad = p.detach() - goal + 0.1 * torch.randn(shape, generator=generator)
        p.grad = grad.T.contiguous().T if turned else grad
        optimizer.step()
    return p.detach(), optimizer


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    (state,) = optimizer.state.values()
    return [state["state1"], state["state2"]]


@pytest.mark.parametrize(("shape", "dtype", "near"), [(LARGE, torch.uint8, 0.02), (SMALL, torch.float32, 1e-5)])
def test_it_ends_where_adamw_does_but_for_the_rounding_of_its_moments(shape: tuple[int, int], dtype: torch.dtype, near: float) -> None:
    (found, optimizer), (wanted, _) = stepped("adamw8bit", shape), stepped("adamw", shape)
    assert {m.dtype for m in moments(optimizer)} == {dtype}
    assert float((found - wanted).norm() / wanted.norm()) < near


@pytest.mark.parametrize("shape", [LARGE, SMALL])
def test_it_goes_by_places_and_not_by_memory(shape: tuple[int, int]) -> None:
    assert torch.equal(stepped("adamw8bit", shape)[0], stepped("adamw8bit", shape, turned=True)[0])


def test_a_round_trains_with_it(tiny_llama: Path) -> None:
    """The factors of a small rank have float32 moments: the same round as with AdamW."""
    ends = []
    for kind in ("adamw8bit", "adamw8bit", "adamw"):
        adapted = built(tiny_llama, "causal_lm", dtype="float32")
        train = replace(TRAIN, optimizer=kind, local_steps=4, batch_size=4)
        check_abilities(train, adapted)
        start = adapted.trained()
        assert fit(adapted, TASKS["causal_lm"], texts(), train=train, site=SITE).steps == 4
        ends.append((flat(dict(start)), flat(dict(adapted.trained()))))
    (start, first), (_, again), (_, wanted) = ends
    assert torch.equal(first, again)
    assert float((first - wanted).norm()) < 1e-3 * float((wanted - start).norm())


def test_private_steps_are_taken_with_it(tiny_llama: Path) -> None:
    ends = []
    for kind in ("adamw8bit", "adamw"):
        case = build_case(tiny_llama, "causal_lm", "lora_sb")
        noisy = mechanism(0.5, sigma=1.0, rate=0.4, steps=3, max_batch=4)
        assert private_fit(case, noisy, optimizer=kind, lr=0.01, check=True).steps == 3
        ends.append(flat(dict(case.adapted.trained())))
    start = flat({name: case.state[name] for name in case.adapted.trained()})
    assert float((ends[0] - ends[1]).norm()) < 1e-3 * float((ends[1] - start).norm())
