"""Where the randomness of private training comes from.

In a simulation it comes from the seed, so that runs can be repeated, and epsilon is labelled as of a simulation: whoever knows the seed
can subtract the noise. On a real node it comes from the operating system and never leaves the process. That holds for dropout too: one
example more or less moves the masks of all that are drawn after it, and only for who does not know the masks are the others' gradients
the same in distribution, which is what a sensitivity of C rests on.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from fedsb.core.rng import stream_seed, torch_generator

# Where the 624 words of the Mersenne twister lie in the state of a CPU generator, each in the low half of 8 bytes.
WORDS, FIRST = 624, 24


@dataclass(frozen=True)
class Streams:
    """Generators of a round: of the noise, on the device of the weights, and of Poisson samples and dropout, on the CPU."""

    noise: torch.Generator
    sampling: torch.Generator
    dropout: torch.Generator


def simulated_streams(seed: int, client: str, round_number: int, exchange: str, device: torch.device) -> Streams:
    """Return the named streams of a simulation."""
    noise, sampling = (stream_seed(seed, purpose, client, round_number, exchange) for purpose in ("noise", "poisson"))
    dropout = torch_generator(seed, "dropout", client, round_number)
    return Streams(torch.Generator(device).manual_seed(noise), torch.Generator().manual_seed(sampling), dropout)


def secret_streams(device: torch.device) -> Streams:
    """Return streams that nobody can repeat."""
    cpu = torch.device("cpu")
    return Streams(secret_generator(device), secret_generator(cpu), secret_generator(cpu))


def secret_generator(device: torch.device) -> torch.Generator:
    """Return a generator whose whole state comes from the operating system.

    ``manual_seed`` uses 32 bits of its seed on a CPU: an adversary could try them all and subtract the noise.
    """
    generator = torch.Generator(device)
    if device.type != "cpu":
        return generator.manual_seed(int.from_bytes(os.urandom(8), "big") >> 1)
    state = generator.manual_seed(0).get_state()
    words = torch.frombuffer(bytearray(os.urandom(4 * WORDS)), dtype=torch.uint8).view(WORDS, 4)
    state[FIRST : FIRST + 8 * WORDS].view(WORDS, 8)[:, :4] = words
    return generator.set_state(state)
