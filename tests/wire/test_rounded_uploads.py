"""Error feedback: what was decoded adds up to what was meant, and what is left out stays below a step."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsb.core.rng import torch_generator
from fedsb.core.state import HEAD, Name, State
from fedsb.wire.rounded_uploads import Rounding

law = settings(max_examples=25, deadline=None)
A, R, C = Name("x", "A"), Name("x", "R"), Name("c.bias", HEAD)
SHAPES = {A: (3, 50), R: (2, 2), C: (5,)}


def drawn(seed: int, scale: float = 1.0) -> State:
    shapes = enumerate(SHAPES.items())
    return State({name: scale * torch.randn(shape, generator=torch_generator(seed + i, "test")) for i, (name, shape) in shapes})


@law
@given(st.integers(0, 2**32), st.integers(1, 12), st.sampled_from([1e-4, 1.0]), st.sampled_from([0.0, 100.0]))
def test_the_sum_of_what_was_decoded_is_that_of_what_was_meant_less_the_last_rest(seed: int, rounds: int, size: float, away: float) -> None:
    """Whatever the client was sent, and however far that is from zero; names that rest in a round keep what is left of them."""
    meant, decoded, left = ({name: torch.zeros(shape).double() for name, shape in SHAPES.items()} for _ in range(3))
    carried = State()
    for number in range(rounds):
        begun = drawn(seed + 10 * number).map(lambda t: t + away)
        change = drawn(seed + 10 * number + 5, size)
        names = [name for name in SHAPES if name != R or number % 2]
        upload = State({name: begun[name] + change[name] for name in names})
        rounded = Rounding("int8", lambda begun=begun: begun, carried, ("A", "R", HEAD)).of(upload)
        for name in names:
            meant[name] += upload[name].double() - begun[name].double()
            decoded[name] += rounded.sent[name].double()
            torch.testing.assert_close(rounded.decoded[name], begun[name] + rounded.sent[name], rtol=0, atol=0)
        carried = rounded.left
    left |= {name: t.double() for name, t in carried.items()}
    for name in SHAPES:
        torch.testing.assert_close(decoded[name], meant[name] - left[name], rtol=0, atol=1e-6 * (rounds * size + 1e-6 * away))
        if left[name].any():
            assert float(left[name].abs().max()) <= 6 * size / 253  # half a step of a change of six deviations, however many rounds


def test_a_change_below_half_a_step_is_lost_without_feedback_and_arrives_with_it() -> None:
    """A value that moves by 1/1000 of its block's largest: int8 has steps of 1/127."""
    change = torch.tensor([1.0, 1e-3])
    for roles, arrived in ((("A",), 1000 * 1e-3), ((), 0.0)):
        carried, total = State(), torch.zeros(2)
        for _ in range(1000):
            rounded = Rounding("int8", State, carried, roles).of(State({A: change}))
            carried, total = rounded.left, total + rounded.sent[A]
        assert abs(float(total[1]) - arrived) <= 1 / 127


def test_what_was_sent_is_sent_again_with_the_same_bits() -> None:
    rounded = Rounding("int8", lambda: drawn(1), drawn(2, 0.01), ("A",)).of(drawn(3))
    again = Rounding("int8").of(rounded.sent)
    assert all(torch.equal(again.sent[name], t) for name, t in rounded.sent.items())


def test_what_is_not_finite_leaves_nothing() -> None:
    broken = State({A: torch.tensor([1.0, float("nan")])})
    rounded = Rounding("int8", State, State({A: torch.ones(2)}), ("A",)).of(broken)
    assert not len(rounded.left)
    assert bool(rounded.sent[A].isnan().any())


def test_other_wires_leave_nothing_and_send_what_they_are_given() -> None:
    given = State({A: torch.tensor([1 + 2.0**-9])})
    for dtype, decoded in (("float32", given[A]), ("bfloat16", torch.ones(1))):
        rounded = Rounding(dtype, lambda: given, roles=("A",)).of(given)
        assert rounded.sent is given
        assert not len(rounded.left)
        assert torch.equal(rounded.decoded[A], decoded)
