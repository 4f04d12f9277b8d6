"""What must hold on a GPU: the results of the CPU, in float32; the same bits twice; and no waiting inside a training step."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.clipping import Clipping
from clients.private import Mechanism, private_fit, private_lesson
from clients.sampling import sample_backward, sampled_gradients
from clients.stacked import taught_together
from fedsb.config.compose import load
from fedsb.core.state import HEAD, State, sha256
from fedsb.models.backward import Backward
from fedsb.models.build import build_model
from fedsb.models.evaluate import evaluate
from fedsb.models.fit import Lesson, dropout_of, fit, fit_lesson
from fedsb.models.spread import spread
from fedsb.privacy.randomness import simulated_streams
from fedsb.stack.stack import Stack
from fedsb.tasks.task import TASKS
from strategies import STRATEGIES
from tests.clients.private_cases import Case, build_case, mechanism
from tests.core.test_devices import Crossings
from tests.models.test_no_waiting import SITE, STEPS, TRAIN, steps_of
from tests.models.test_spread import too_small_for
from tests.strategies.federations import Federation, classification, federate, in_rounds, language_model, start_of
from tests.strategies.private_runs import EXAMPLE, run_privately, small

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

METHODS = list(STRATEGIES)
# Adam's first steps are the signs of gradients, however small.
PLAIN = ["train.optimizer=sgd", "train.lr=0.1", in_rounds(2), "adapter.alpha=5"]
KINDS = [("tiny_bert", "classification"), ("tiny_llama", "causal_lm"), ("tiny_gpt2", "causal_lm")]


@pytest.fixture(scope="module")
def quiet_bert(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT without dropout: a GPU draws other masks than a CPU."""
    folder = tmp_path_factory.mktemp("quiet") / "bert"
    shutil.copytree(tiny_bert, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}))
    return folder


@contextmanager
def no_waiting() -> Iterator[None]:
    """Let torch refuse whatever makes the host wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def alike(one: State, other: State) -> None:
    for name, t in one.items():
        assert float((other[name] - t).norm()) <= 1e-4 * max(1e-3, float(t.norm())), name


def run(method: str, data: list[str], *more: str) -> Federation:
    return federate([*data, f"method={method}", start_of(method), *PLAIN, *more])


@pytest.mark.parametrize("method", METHODS)
def test_a_run_on_a_gpu_is_that_of_the_cpu(
    method: str, quiet_bert: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path))
    on_cpu, on_gpu = (run(method, classification(quiet_bert, tiny_csv), f"device={device}") for device in ("cpu", "cuda"))
    for before, after in zip(on_cpu.kept.states, on_gpu.kept.states, strict=True):
        # Factors that a rule makes anew come from a decomposition, and are as good the other way round.
        alike(before.pick(HEAD) if STRATEGIES[method].anew else before, after)
    for before, after in zip(on_cpu.records, on_gpu.records, strict=True):
        measured = before.metrics.keys() & {"loss"}  # nobody but the clients measures where there is no global model
        assert {key: after.metrics[key] for key in measured} == pytest.approx({key: before.metrics[key] for key in measured}, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits_twice(
    method: str, tiny_llama: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "head_only":
        pytest.skip("a language model has no head")
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path))
    one, other = (run(method, language_model(tiny_llama, tiny_csv), "device=cuda", "train.optimizer=adamw") for _ in range(2))
    assert [sha256(state) for state in one.kept.states] == [sha256(state) for state in other.kept.states]


@pytest.mark.parametrize("method", ["fed_sb", "fedavg_lora", "fedex_lora"])
def test_private_training_passes_its_self_checks_on_a_gpu(
    method: str, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise is drawn on the GPU, so the bits are others than the CPU's; what is charged is the same."""
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path))
    on_cpu, on_gpu = (
        run_privately([*small(tiny_bert, tmp_path, *EXAMPLE), f"method={method}", start_of(method), f"device={device}"], tmp_path / device)
        for device in ("cpu", "cuda")
    )
    assert on_gpu.error is None
    assert on_gpu.records[-1].epsilon == on_cpu.records[-1].epsilon
    assert not on_gpu.records[-1].failed


def case_of(request: pytest.FixtureRequest, kind: tuple[str, str], family: str, *, dropout: bool) -> Case:
    return build_case(request.getfixturevalue(kind[0]), kind[1], family, dropout=dropout)


def on_the_gpu(case: Case) -> Case:
    adapted = copy.deepcopy(case.adapted)
    adapted.model.to("cuda")
    return replace(case, adapted=adapted)


@pytest.mark.parametrize("family", ["lora", "lora_sb"])
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_private_steps_without_noise_are_those_of_the_cpu(request: pytest.FixtureRequest, kind: tuple[str, str], family: str) -> None:
    case = case_of(request, kind, family, dropout=False)
    ended = [trained_privately(each) for each in (case, on_the_gpu(case))]
    alike(*ended)


def trained_privately(case: Case) -> State:
    case.adapted.install(case.state, case.frozen)
    streams = simulated_streams(0, "client-1", 1, "train", case.adapted.device)
    how = {"train": TRAIN, "site": SITE, "mechanism": mechanism(0.5, rate=0.5, steps=4), "streams": streams}
    private_fit(case.adapted, case.task, case.features, **how)
    return case.adapted.trained()


@pytest.mark.parametrize("how", [{}, {"packing": True}, {"accumulation": 2}], ids=["plain", "packing", "accumulation"])
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_a_step_waits_for_nothing(request: pytest.FixtureRequest, kind: tuple[str, str], how: dict[str, Any]) -> None:
    if "packing" in how and kind[1] != "causal_lm":
        pytest.skip("packing is for language models")
    case = on_the_gpu(case_of(request, kind, "lora", dropout=True))
    case.adapted.install(case.state, case.frozen)
    train = replace(TRAIN, optimizer="adamw", **how)
    lesson = fit_lesson(case.adapted.trainable(), case.features, train=train, site=SITE)
    case.adapted.model.train()
    with no_waiting():
        assert steps_of(lesson, Backward(case.adapted, case.task, train)) == STEPS


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_a_private_step_waits_for_nothing(request: pytest.FixtureRequest, kind: tuple[str, str], clipping: str) -> None:
    case = on_the_gpu(case_of(request, kind, "lora", dropout=True))
    adapted, task = case.adapted, case.task
    adapted.install(case.state, case.frozen)
    trained = adapted.trainable()
    lesson = private_lesson(
        adapted,
        trained,
        lambda batch: task.forward(adapted.model, batch),
        task,
        case.features,
        train=TRAIN,
        site=SITE,
        mechanism=Mechanism(Clipping(clipping, 1.0, 0.7), 0.5, 9),
        streams=simulated_streams(0, "client-1", 1, "train", adapted.device),
    )
    with sampled_gradients(adapted.model), no_waiting():
        backward = lambda asked: sample_backward(adapted, task, asked, train=TRAIN, parameters=list(trained.values()))  # noqa: E731
        assert steps_of(lesson, backward) == STEPS


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_clients_side_by_side_wait_for_nothing(request: pytest.FixtureRequest, kind: tuple[str, str]) -> None:
    case = on_the_gpu(case_of(request, kind, "lora", dropout=True))
    case.adapted.install(case.state, case.frozen)
    stack = Stack(case.adapted, [dropout_of(replace(SITE, client=client)) for client in "ab"])

    def some(member: int) -> Lesson[int]:
        lesson = fit_lesson(stack.members[member], case.features[member:], train=TRAIN, site=SITE)
        asked = next(lesson)
        for _ in range(STEPS):
            asked = lesson.send((yield asked))
        return STEPS

    with no_waiting():
        assert taught_together(stack, case.task, {i: some(i) for i in range(2)}, train=TRAIN) == {0: STEPS, 1: STEPS}


@pytest.mark.parametrize("family", ["lora", "lora_sb"])
def test_a_round_goes_down_and_up_in_one_copy_each(request: pytest.FixtureRequest, family: str) -> None:
    case = on_the_gpu(case_of(request, KINDS[0], family, dropout=False))
    case.adapted.install(case.state, case.frozen)
    with Crossings() as crossings:
        case.adapted.install(case.state, case.frozen)
        trained = case.adapted.trained()
    assert (crossings.down, crossings.up) == (1, 1)
    alike(case.state.merge(trained), case.state)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_an_evaluation_moves_no_outputs_of_a_language_model(request: pytest.FixtureRequest, kind: tuple[str, str]) -> None:
    case = case_of(request, kind, "lora", dropout=False)
    there = on_the_gpu(case)
    for each in (case, there):
        each.adapted.install(case.state, case.frozen)
    features = case.features if kind[1] == "classification" else [{"input_ids": row["input_ids"]} for row in case.features]
    on_cpu = evaluate(case.adapted, TASKS[kind[1]], features, train=TRAIN)
    with Crossings() as crossings:
        on_gpu = evaluate(there.adapted, TASKS[kind[1]], features, train=TRAIN)
    assert on_gpu == pytest.approx(on_cpu, rel=1e-4)
    assert crossings.values_up <= 4 * len(case.features)


def spread_over(case: Case, *devices: str) -> Case:
    """Return a case whose layers lie on two devices, and all else on the first."""
    adapted = copy.deepcopy(case.adapted)
    assert "over several GPUs" in spread(adapted.model, [torch.device(device) for device in devices], too_small_for(adapted.model))
    return replace(case, adapted=adapted)


@pytest.mark.parametrize("family", ["lora", "lora_sb"])
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_a_round_of_a_base_that_half_lies_elsewhere_is_that_of_the_cpu(
    request: pytest.FixtureRequest, kind: tuple[str, str], family: str
) -> None:
    """The CPU is the second device: what one GPU can show."""
    case = case_of(request, kind, family, dropout=False)
    ended = []
    for each in (case, spread_over(case, "cuda:0", "cpu")):
        each.adapted.install(each.state, each.frozen)
        fit(each.adapted, each.task, each.features, train=replace(TRAIN, gradient_checkpointing=True), site=SITE)
        ended.append(each.adapted.trained())
    assert {p.device.type for p in each.adapted.trainable().values()} == {"cuda", "cpu"}
    alike(*ended)


def test_a_base_that_fits_one_gpu_lies_there_whole(tiny_llama: Path) -> None:
    config = load(["model=pretrained", f"model.name='{tiny_llama}'", "rank=2", "model.device_map=auto", "device=cuda"])
    adapted = build_model(config.model, config.adapter, family="lora", task=TASKS["causal_lm"], labels=(), seed=0, device="cuda")
    assert {str(p.device) for p in adapted.model.parameters()} == {"cuda:0"}
    assert "model.device_map=auto: the model fits one GPU, and lies on cuda:0" in adapted.remarks


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_a_step_over_two_gpus_waits_for_nothing_and_has_the_same_bits_twice(request: pytest.FixtureRequest, kind: tuple[str, str]) -> None:
    case = spread_over(case_of(request, kind, "lora", dropout=True), "cuda:0", "cuda:1")
    train, ended = replace(TRAIN, optimizer="adamw"), []
    for _ in range(2):
        case.adapted.install(case.state, case.frozen)
        fit(case.adapted, case.task, case.features, train=replace(train, gradient_checkpointing=True), site=SITE)
        ended.append(sha256(case.adapted.trained()))
    assert ended[0] == ended[1]
    lesson = fit_lesson(case.adapted.trainable(), case.features, train=train, site=SITE)
    case.adapted.model.train()
    with no_waiting():
        assert steps_of(lesson, Backward(case.adapted, case.task, train)) == STEPS
