"""What the laws of self-checks share: a sound mechanism, the check that fails, and a layer to plant faults in."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from clients.private import Mechanism
from fedsb.privacy.codes import CODES, SelfCheckFailed
from tests.clients.private_cases import Case, fit, mechanism

SOUND = mechanism(0.5, sigma=1.0, rate=0.4, steps=2, max_batch=4)
Patch = pytest.MonkeyPatch


def code(case: Case, how: Mechanism = SOUND, **options: Any) -> str | None:
    """Return the name of the check that fails, or None."""
    try:
        fit(case, how, check=True, **options)
    except SelfCheckFailed as failed:
        return next(name for name, known in CODES.items() if known is failed.code)
    return None


def layer_of(case: Case) -> nn.Module:
    return case.adapted.layers["bert.encoder.layer.1.attention.self.query"]
