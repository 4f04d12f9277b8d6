"""Secret streams: nobody can repeat them, and what they draw is what a seeded generator draws."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedsb.privacy.randomness import FIRST, WORDS, secret_generator, secret_streams, simulated_streams

CPU = torch.device("cpu")


def words(generator: torch.Generator) -> Tensor:
    """The 624 words of the Mersenne twister."""
    return generator.get_state()[FIRST : FIRST + 8 * WORDS].view(torch.int64)


def test_the_words_lie_where_they_are_looked_for() -> None:
    """A 32-bit seed is the first word, and the recurrence of MT19937's seeding gives the others."""
    found = words(torch.Generator().manual_seed(5)).tolist()
    wanted = [5]
    for i in range(1, WORDS):
        wanted.append((1812433253 * (wanted[-1] ^ (wanted[-1] >> 30)) + i) % 2**32)
    assert found == wanted


def test_the_whole_state_is_secret() -> None:
    """Not the 32 bits that a seed has on a CPU: every word differs from one generator to the next, in about half of its bits."""
    streams = secret_streams(CPU)
    generators = [streams.noise, streams.sampling, streams.dropout, *(secret_generator(CPU) for _ in range(5))]
    states = torch.stack([words(g) for g in generators])
    assert 0 <= int(states.min()) <= int(states.max()) < 2**32
    bits = (states[:, :, None] >> torch.arange(32)) & 1
    # 32 x 8 x 624 bits: five deviations.
    assert abs(float(bits.double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(bits.numel())
    for i in range(1, len(states)):
        different = float((bits[0] != bits[i]).double().mean())
        assert abs(different - 0.5) < 6 * 0.5 / math.sqrt(32 * WORDS)
        assert int((states[0] != states[i]).sum()) > WORDS - 3


def test_draws_differ_between_calls_and_are_normal() -> None:
    """Kolmogorov and Smirnov's distance; a sound generator exceeds it once in a million."""
    one, other = (torch.randn(20_000, generator=secret_streams(CPU).noise, dtype=torch.float64) for _ in range(2))
    assert not torch.equal(one, other)
    assert abs(float(torch.stack([one, other]).corrcoef()[0, 1])) < 5.5 / math.sqrt(20_000)
    for draws, distribution in (
        (one, lambda x: 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
        (torch.rand(20_000, generator=secret_streams(CPU).sampling, dtype=torch.float64), lambda x: x),
    ):
        expected = distribution(draws.sort().values)
        steps = torch.arange(20_001, dtype=torch.float64) / 20_000
        distance = max(float((steps[1:] - expected).max()), float((expected - steps[:-1]).max()))
        assert distance < 2.7 / math.sqrt(20_000)


def test_a_state_that_was_set_can_be_drawn_from_for_long() -> None:
    """Past the 624 words that were given, and in both the scalar and the vectorised path of the normal draws."""
    generator = secret_generator(CPU)
    draws = torch.cat([torch.randn(5, generator=generator) for _ in range(400)] + [torch.randn(3000, generator=generator)])
    assert len(set(draws.tolist())) > 4900
    assert abs(float(draws.std()) - 1) < 6 / math.sqrt(10_000)


def test_simulated_streams_are_named() -> None:
    def draw(*name: object) -> tuple[float, float]:
        streams = simulated_streams(*name, CPU)  # type: ignore[arg-type]
        return float(torch.rand((), generator=streams.noise)), float(torch.rand((), generator=streams.sampling))

    first = draw(0, "client-1", 1, "train")
    assert draw(0, "client-1", 1, "train") == first
    others = [(1, "client-1", 1, "train"), (0, "client-2", 1, "train"), (0, "client-1", 2, "train"), (0, "client-1", 1, "range.0")]
    assert len({*first, *(value for name in others for value in draw(*name))}) == 10
