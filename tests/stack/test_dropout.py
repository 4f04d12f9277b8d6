"""What dropout multiplies by is what torch's own draws, whatever way it is drawn and however the tensor lies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedsb.core.rng import Turns
from fedsb.stack import dropout
from fedsb.stack.dropout import fill_noise


def flat() -> Tensor:
    return torch.full((3, 5, 7), torch.nan)


def narrowed() -> Tensor:
    return torch.full((3, 6, 9), torch.nan)[:, :5, 1:8]


def across() -> Tensor:
    return torch.full((7, 5, 3), torch.nan).transpose(0, 2)


@pytest.mark.parametrize("make", [flat, narrowed, across])
@pytest.mark.parametrize("p", [0.1, 0.37, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("by_words", [True, False])
def test_it_is_what_dropout_multiplies_by(make: object, p: float, by_words: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not by_words:
        monkeypatch.setattr(dropout, "_words_are_known", lambda: False)
    noise = make()  # type: ignore[operator]
    torch.manual_seed(11)
    wanted = F.dropout(torch.ones_like(noise), p)  # which lies as the noise does
    after = torch.get_rng_state()
    turns, here = Turns([torch.Generator().manual_seed(3), torch.Generator().manual_seed(11)]), torch.get_rng_state()
    fill_noise(noise, p, turns, 1)
    assert torch.equal(noise, wanted)
    assert torch.equal(turns.cpu[1].get_state(), after)
    assert torch.equal(torch.get_rng_state(), here)
