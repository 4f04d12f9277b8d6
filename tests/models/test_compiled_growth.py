"""Compiled training goes on through rounds that add to frozen weights: one program for nothing, factors of any rank and a matrix."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fedsb.adapters.frozen_part import FrozenPart
from fedsb.adapters.residual import Residual
from fedsb.app.assembly import corpus_of, model_of
from fedsb.config.compose import load
from fedsb.core.rng import torch_generator
from fedsb.models.adapted import AdaptedModel
from fedsb.models.fit import Site, fit
from fedsb.tasks.task import TASKS
from tests.models.test_backward import TRAIN, texts
from tests.models.test_narrow import built
from tests.strategies.federations import Federation, federate, language_model

RANKS = (0, 1, 2, 5, 60)  # nothing, ranks that grow, and more than a matrix weighs
pytestmark = [
    pytest.mark.timeout(1800),  # graphs take half a minute of one core, and several where others work too
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # torch's compiler, of what it does itself
]


@pytest.fixture(autouse=True)
def no_code() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(adapted: AdaptedModel) -> None:
    """Have graphs made, of backward passes too, without the code that torch would make of them, which takes minutes."""
    vars(adapted)["compiled"] = torch.compile(adapted.model, dynamic=True, backend="aot_eager")


def rounds(
    adapted: AdaptedModel, start: dict[object, Tensor], *, compile: bool, ranks: tuple[int, ...] = RANKS
) -> tuple[list[Tensor], list[int]]:
    """Train over rounds that add to every weight; return what was trained, and how many graphs there were after each round."""
    for name, p in adapted.trainable().items():
        p.data.copy_(start[name])
    residuals, train = {n: Residual(*layer.shape) for n, layer in adapted.layers.items()}, replace(TRAIN, batch_size=4, compile=compile)
    found, graphs, draw = [], [], torch_generator(0, "growth")
    for number, rank in enumerate(ranks, start=1):
        for name, layer in adapted.layers.items():
            m, n = layer.shape
            residuals[name].add(number, 0.02 * torch.randn(m, rank, generator=draw), torch.randn(rank, n, generator=draw))
            layer.set_residual(residuals[name] if rank else None)
        fit(adapted, TASKS["causal_lm"], texts(7), train=train, site=Site(seed=3, client="client-1", round=number, num_rounds=len(ranks)))
        found += [p.detach().clone() for p in adapted.trainable().values()]
        graphs.append(counters["stats"]["unique_graphs"])
    return found, graphs


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype"), [("lora", "float32"), ("lora_sb", "bfloat16"), ("abba", "float32")])
def test_what_is_added_compiles_nothing_anew_and_trains_alike(tiny_llama: Path, family: str, dtype: str) -> None:
    adapted = built(tiny_llama, "causal_lm", family, dtype=dtype)
    adapted.expect_growth(True)
    start = {name: p.detach().clone() for name, p in adapted.trainable().items()}
    compiled(adapted)
    ours, graphs = rounds(adapted, start, compile=True)
    assert graphs == [graphs[0]] * len(RANKS)
    assert graphs[0] > 0
    assert not counters["graph_break"]
    plain, _ = rounds(adapted, start, compile=False)
    rough = {"float32": 1e-3, "bfloat16": 5e-2}[dtype]
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=rough, atol=rough / 10)


@pytest.mark.slow
def test_what_was_compiled_for_a_model_serves_others_of_its_shape(tiny_llama: Path) -> None:
    """Of other seeds, each beside what its own rounds add; and one of them that was trained without growth in between."""
    graphs = []
    for seed in range(3):
        adapted = built(tiny_llama, "causal_lm", "lora", dtype="float32", seed=seed)
        compiled(adapted)
        start = {name: p.detach().clone() for name, p in adapted.trainable().items()}
        adapted.expect_growth(True)
        ours, seen = rounds(adapted, start, compile=True, ranks=(0, 2))
        graphs += seen
        plain, _ = rounds(adapted, start, compile=False, ranks=(0, 2))
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert graphs == [graphs[0]] * 6
    counts = []
    for grows in (False, True, False, True):
        adapted.expect_growth(grows)
        counts.append(rounds(adapted, start, compile=True, ranks=(2,))[1][-1])
    assert counts == [counts[0]] * 4


def test_a_copy_of_a_part_goes_through_what_is_its_own() -> None:
    part = FrozenPart(nn.Linear(5, 4, bias=False), "factors")
    part.expect_growth()
    other, third = copy.deepcopy(part), pickle.loads(pickle.dumps(part))
    for each, scale in ((part, 1.0), (other, 2.0), (third, 3.0)):
        each.expect_growth()
        each.set(Residual.of(scale * torch.ones(4, 5)))
    assert len({int(each._key) for each in (part, other, third)}) == 3
    x = torch.randn(3, 5)
    for each, scale in ((part, 1.0), (other, 2.0), (third, 3.0)):
        passed = torch.ops.fedsb.through(x, each._key, 4, False)
        torch.testing.assert_close(passed, scale * x.sum(-1, keepdim=True).expand(3, 4))


def test_the_operation_is_one_that_torch_can_compile() -> None:
    part = FrozenPart(nn.Linear(5, 4, bias=False), "factors")
    part.expect_growth()
    for pairs in (0, 1):
        residual = Residual(4, 5)
        for version in range(pairs):
            residual.add(version, torch.randn(4, 2), torch.randn(2, 5))
        part.set(residual if pairs else None)
        torch.library.opcheck(torch.ops.fedsb.through.default, (torch.randn(3, 5, requires_grad=True), part._key, 4, False))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedex_lora", "flora"])
def test_three_rounds_of_a_federation_compile_once(
    method: str, tiny_llama: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    given = [*language_model(tiny_llama, tiny_csv), f"method={method}", "federation.num_rounds=3", "train.lr=0.5", "train.local_steps=2"]
    # Torch makes another program for a batch of one row, and Adam much of what rounding leaves of a gradient that is nothing.
    given += ["train.batch_size=64", "train.optimizer=sgd"]

    def run(*more: str) -> Federation:
        return federate([*given, *more], timeout=3600.0)  # graphs take a minute where others work too

    config = load([*given, "train.compile=true"])
    compiled(model_of(config, corpus_of(config).labels))
    ours = run("train.compile=true")
    assert counters["stats"]["unique_graphs"] == 1
    assert all(residual.pairs or residual.dense is not None for residual in ours.frozen.view().residuals.values())
    theirs = run()
    for a, b in zip(ours.records, theirs.records, strict=True):
        assert a.metrics == pytest.approx(b.metrics, rel=1e-3)
