"""Faults to plant, one of a kind, and the rows that must catch each: the real class or function is replaced by one with a single fault."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import faults_clipping as clip
import faults_sampling as draw
from evaluations import EvaluationRow
from others import ServerRow, StartRow
from rows import Row, TrainRow
from subject import Breaks
from watch import replaced

import clients.private as private
import clients.private_evaluation as private_evaluation
import clients.private_start as private_start
import fedsb.models.collating as collating
import fedsb.privacy.randomness as randomness
import strategies.privacy.mean as private_mean
from clients.clipping import CLIPPINGS
from fedsb.core.state import State
from strategies.privacy import client_unit

Plant = Callable[[Row], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Attributes:
        name: in words.
        rows: names of the rows, each of which must catch it.
        plants: its forms, each of which must be caught: for a context in which the code that a row runs has it.
    """

    name: str
    rows: tuple[str, ...]
    plants: tuple[Plant, ...]


def clipping(breaks: Breaks) -> Plant:
    """Break the clipping of a row that trains."""

    def plant(row: Row) -> AbstractContextManager[Any]:
        assert isinstance(row, TrainRow)
        return replaced(CLIPPINGS, row.kind, breaks(CLIPPINGS[row.kind]))

    return plant


def module(owner: Any, name: str, breaks: Callable[[Any], Any]) -> Plant:
    """Break a function or class of a module."""
    return lambda row: replaced(owner, name, breaks(getattr(owner, name)))


def _server(breaks: Callable[[Any], Any]) -> Plant:
    @contextmanager
    def plant(row: Row) -> Iterator[None]:
        broken = breaks(private_mean.PrivateSum)
        with ExitStack() as stack:
            for owner in (private_mean, client_unit):
                stack.enter_context(replaced(owner, "PrivateSum", broken))
            yield

    return plant


def _half_sum(real: Any) -> Any:
    class Half(real):  # type: ignore[misc]
        def __init__(self, *args: Any, noise_multiplier: float, **kwargs: Any) -> None:
            super().__init__(*args, noise_multiplier=noise_multiplier / 2, **kwargs)

    return Half


def _long_sum(real: Any) -> Any:
    class Unclipped(real):  # type: ignore[misc]
        _clip: float

        def add(self, state: State) -> float:
            kept, self._clip = self._clip, math.inf
            norm: float = super().add(state)
            self._clip = kept
            return norm

    return Unclipped


def _divided_sum(real: Any) -> Any:
    class ByAnswers(real):  # type: ignore[misc]
        _divisor: int

        def add(self, state: State) -> float:
            self._answers = getattr(self, "_answers", 0) + 1
            return float(super().add(state))

        def mean(self) -> State:
            self._divisor = getattr(self, "_answers", self._divisor)
            made: State = super().mean()
            return made

    return ByAnswers


def _half_start(real: Any) -> Any:
    return lambda total, *, noise_multiplier, **more: real(total, noise_multiplier=noise_multiplier / 2, **more)


def _bare_start(real: Any) -> Any:
    def add_noise(total: Any, **given: Any) -> State:
        noised: State = real(total, **given)
        first = next(iter(noised.keys()))
        return State({name: total.sum[name].float() / given["expected"] if name == first else t for name, t in noised.items()})

    return add_noise


def _long_start(real: Any) -> Any:
    return lambda *args, max_norm, **more: real(*args, max_norm=10 * max_norm, **more)


def _half_metrics(real: Any) -> Any:
    return lambda values, multiplier, generator: real(values, multiplier / 2, generator)


def _bare_accuracy(real: Any) -> Any:
    return lambda values, *given: {**real(values, *given), "accuracy": float(values["accuracy"].mean())}


def _of_one_value(real: Any) -> Any:
    return lambda values, multiplier, generator: real(values, multiplier / math.sqrt(len(values)), generator)


def _long_losses(real: Any) -> Any:
    def bounded(task: Any, records: Any, targets: Any, most: float) -> Any:
        return {**real(task, records, targets, most), "clipped_loss": task.items(records, targets)["loss"].double() / most}

    return bounded


def _same_streams(real: Any) -> Any:
    return lambda seed, client, round_number, exchange, device: real(seed, client, 0, exchange, device)


def _one_client(real: Any) -> Any:
    return lambda seed, client, round_number, exchange, device: real(seed, "the same", round_number, exchange, device)


def _longest(real: Any) -> Any:
    return lambda features, tokenizer, *length: real(features, tokenizer)


def half(row: Row) -> AbstractContextManager[Any]:
    """Halve the noise of a row of any kind."""
    kinds: Sequence[tuple[type, Plant]] = (
        (TrainRow, clipping(clip.half)),
        (StartRow, module(private_start, "add_noise", _half_start)),
        (ServerRow, _server(_half_sum)),
        (EvaluationRow, module(private_evaluation, "noised", _half_metrics)),
    )
    return next(plant for kind, plant in kinds if isinstance(row, kind))(row)


WHOLE, SAMPLED, RARE = "flat, all examples", "flat, sampled", "empty samples"
STARTS = ("private start, G P", "private start, Gᵀ Q")
LENGTHS = ("two lengths, flat", "two lengths, functorch", "two lengths, stack", "two lengths, private start")
SERVER = ("privacy=client", "privacy=client, adaptive", "privacy=client, start")


def faults(rows: Sequence[Row]) -> list[Fault]:
    """Give the table of faults."""
    tensors = range(len(next(row for row in rows if row.name == WHOLE).sizes))
    sampler = partial(module, private, "UniformWithReplacementSampler")
    return [
        Fault("half the noise", tuple(row.name for row in rows), (half,)),
        Fault("no noise on one tensor, each in turn", (WHOLE,), tuple(clipping(partial(clip.bare, only=i)) for i in tensors)),
        Fault("half the noise on one tensor, each in turn", (SAMPLED,), tuple(clipping(partial(clip.weak, only=i)) for i in tensors)),
        Fault("no noise on the adapters", (WHOLE,), (clipping(partial(clip.bare, only=range(len(tensors) - 2))),)),
        Fault("no noise", (WHOLE,), (clipping(clip.no_noise),)),
        Fault("no noise on one tensor of a start", STARTS, (module(private_start, "add_noise", _bare_start),)),
        Fault("the same noise in every step", (SAMPLED,), (clipping(clip.same_each_step),)),
        Fault("the same noise in every tensor", (WHOLE,), (clipping(clip.same_each_tensor),)),
        Fault("the same noise and samples in every round", (SAMPLED,), (module(randomness, "simulated_streams", _same_streams),)),
        Fault("the same noise and samples for all clients", ("stack",), (module(randomness, "simulated_streams", _one_client),)),
        Fault("no noise on an empty sample", (RARE,), (clipping(clip.only_if_drawn),)),
        Fault("the sum is divided by the number drawn", (SAMPLED, RARE), (clipping(clip.by_number_drawn),)),
        Fault("no clipping", (WHOLE,), (clipping(clip.no_clipping),)),
        Fault("the head left out of the clipping", (WHOLE,), (clipping(clip.head_left_out),)),
        Fault("clipped at ten times C", (SAMPLED, "stack"), (clipping(clip.ten_times),)),
        Fault("per layer without the root", ("per layer", "two lengths, per layer"), (clipping(clip.no_root),)),
        Fault("every example twice", (WHOLE, "physical batches"), (clipping(clip.twice),)),
        Fault("a batch's sum is clipped, not its examples", ("two lengths, two at a time",), (clipping(clip.whole_batches),)),
        Fault("adaptive: no noise on the count", ("adaptive",), (clipping(clip.bare_count),)),
        Fault("adaptive: the sum gets the noise of both", ("adaptive",), (clipping(clip.undivided),)),
        Fault("a start clipped at ten times C", STARTS, (module(private_start, "clipped_sketch", _long_start),)),
        Fault("everyone in every sample", (SAMPLED, "physical batches", "stack"), (sampler(draw.everyone),)),
        Fault("samples of a fixed size", (SAMPLED, "stack"), (sampler(draw.fixed_size),)),
        Fault("one sample for all steps", (SAMPLED, "stack"), (sampler(draw.one_for_all),)),
        Fault("shuffled epochs", (SAMPLED, "per layer"), (sampler(draw.epochs),)),
        Fault("neighbours drawn together", (SAMPLED,), (sampler(draw.together),)),
        Fault("everyone in a start's sample", STARTS, (module(private_start, "poisson_sample", draw.all_of),)),
        Fault("updates are not clipped", SERVER, (_server(_long_sum),)),
        Fault("divided by the clients that answer", SERVER[:1], (_server(_divided_sum),)),
        Fault("noise as if one metric were released", ("evaluation",), (module(private_evaluation, "noised", _of_one_value),)),
        Fault("no noise on the accuracy", ("evaluation",), (module(private_evaluation, "noised", _bare_accuracy),)),
        Fault("losses are not cut", ("evaluation",), (module(private_evaluation, "bounded", _long_losses),)),
        Fault("padding to the longest text", LENGTHS, (module(collating, "pad", _longest),)),
    ]
