"""The frozen part of a layer: a base that nobody trains, and what a run adds to it, held by a stated rule.

``factors``: ``y = W0 x + U (V x)`` beside the base; where factors became too heavy (:mod:`fedsb.adapters.residual`), ``y = W0 x + D x``.
``dense``: ``y = W0 x + D x`` from the first on. ``merge``: ``y = fl(W0 + D) x`` in the base's own dtype, which rounds; W0 is kept beside.
``auto`` is ``factors``: a merge into bfloat16 loses nearly all of a small residual, and one into float32 more than 1e-5 of what is below
some 1/400 of its weight in norm, as residuals of first rounds are.

What stands beside a base is float32 and computes in float32 whatever surrounds it: rounded to bfloat16 once a step it would be a weight
that nobody has trained. W0 is always there to go back to: it is never written to, and only a merge needs a second matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsb.adapters.linear import OUT_IN, out_in, shape_of
from fedsb.adapters.low_rank import Term, joined
from fedsb.adapters.opaque import registered, through
from fedsb.adapters.quantised import dequantised, is_quantised
from fedsb.adapters.residual import Residual
from fedsb.adapters.rounding import WIDE, rounded
from fedsb.core.errors import UserError
from fedsb.core.precision import as_it_is

MERGE, FACTORS, DENSE, AUTO = "merge", "factors", "dense", "auto"
BLOCK = 2**20  # values in float64 at a time


def rule_for(hold: str, weight: Tensor) -> str:
    """Return the rule by which a base of this weight holds what is added to it.

    Raises:
        UserError: a merge into a weight that is no matrix of floats.
    """
    plain = not is_quantised(weight) and weight.is_floating_point()
    if hold == MERGE and not plain:
        raise UserError("frozen.hold=merge needs a base whose weights are floats, and this one is quantised; use frozen.hold=auto")
    return FACTORS if hold == AUTO else hold


def merged(weight: Tensor, residual: Tensor) -> Tensor:
    """Return the sum of two matrices of one shape in the dtype of the weight, each value rounded once from the whole of both."""
    if weight.dtype in WIDE:
        return weight + residual.to(weight)
    made, step = torch.empty_like(weight), max(1, BLOCK // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        made[rows] = rounded(weight[rows].double() + residual[rows].to(weight.device, torch.float64), weight.dtype)
    return made


class FrozenPart:
    """A frozen base layer, and what is added to it.

    Args:
        base: ``nn.Linear`` or ``Conv1D``, or a layer that computes as one.
        hold: ``factors``, ``dense``, ``merge`` or ``auto``.

    Attributes:
        rule: the first three.

    Raises:
        UserError: see :func:`rule_for`.
    """

    def __init__(self, base: nn.Module, hold: str = AUTO) -> None:
        self.base = base
        self._hold = hold
        self.rule = rule_for(hold, self.weight)
        self._pristine = self.weight.data
        self._beside: tuple[Tensor, ...] = ()  # (D,), or (U, V)
        self._terms: tuple[Term, ...] | None = ()
        self._token: str | None = None
        self._grows = False
        self._key = registered(self)  # of what compiled code goes through

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the key: a copy is another part."""
        return {name: value for name, value in vars(self).items() if name != "_key"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a key of its own."""
        vars(self).update(state, _key=registered(self))

    @property
    def beside(self) -> tuple[Tensor, ...]:
        """What stands beside the base: float32 matrices whose product is (m, n), one or two; none where nothing does."""
        return self._beside

    def expect_growth(self, grows: bool = True) -> None:
        """Let compiled code ask at every pass what stands beside the base, where rounds will add to it."""
        self._grows = grows and self.rule != MERGE

    @property
    def weight(self) -> nn.Parameter:
        """The base's own."""
        weight: nn.Parameter = self.base.weight  # type: ignore[assignment]
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) = (out, in)."""
        return shape_of(self.base)

    @property
    def pristine(self) -> Tensor:
        """W0 as it was loaded, viewed as (out, in), in floats: of a quantised base a matrix that is made when it is asked for."""
        return out_in(self.base, dequantised(self._pristine))

    def __call__(self, x: Tensor) -> Tensor:
        """Map (…, n) to (…, m)."""
        y: Tensor = self.base(x)
        added = self.added(x)
        return y if added is None else y + added.to(y.dtype)

    @property
    def matrix(self) -> Tensor | None:
        """The float32 matrix (m, n) to which who adds another one can add it: what stands beside the weight, the weight where nothing does.

        None where factors stand beside it, and where the layer is no plain product in float32. W0 and what is beside it are never summed,
        which would round as much as a merge.
        """
        plain = type(self.base) in OUT_IN and self.weight.dtype == torch.float32
        if not plain or self._asks() or len(self._beside) > 1 or self.base._forward_hooks or self.base._backward_hooks:
            return None
        return self._beside[0] if self._beside else out_in(self.base, self.weight)

    def with_matrix(self, x: Tensor, whole: Tensor) -> Tensor:
        """Map (…, n) to (…, m) with another matrix (m, n) in the place of :attr:`matrix`."""
        if not self._beside:
            return F.linear(x, whole, self.base.bias)  # type: ignore[arg-type]
        y: Tensor = self.base(x)
        return y + F.linear(x, whole)

    def added(self, x: Tensor) -> Tensor | None:
        """Return what stands beside the base makes of x, in float32; None where nothing does."""
        asks = self._asks()
        # In this order: what code that is compiled looks at, it is compiled for.
        if not asks and not self._beside:
            return None
        with as_it_is(x):
            wide = x.to(torch.float32)
            if asks:
                passed: Tensor = through(wide, self._key, self.shape[0], False)
                return passed
            for weight in reversed(self._beside):
                wide = F.linear(wide, weight)
            return wide

    def _asks(self) -> bool:
        return self._grows and torch.compiler.is_compiling()

    def set(self, residual: Residual | None) -> None:
        """Compute with W0 and a residual; None goes back to W0, bit for bit."""
        if residual is None:
            self._clear()
            return
        if self._token is not None and residual.token == self._token:
            return
        self._clear()
        RULES[self.rule](self, residual)
        # A matrix that is not the layer's own is written to when more comes; pairs never are.
        self._terms = residual.pairs if residual.dense is None else None
        self._token = None if any(residual.writes_to(each) for each in self._beside) else residual.token

    def _clear(self) -> None:
        if self.rule == MERGE:
            self.weight.data = self._pristine
        self._beside, self._terms, self._token = (), (), None

    def _merge(self, residual: Residual) -> None:
        added = residual.matrix().to(self._pristine.device)
        self.weight.data = merged(self._pristine, out_in(self.base, added))

    def _stand_dense(self, residual: Residual) -> None:
        self._beside = (residual.matrix().to(self.weight.device),)

    def _stand_factors(self, residual: Residual) -> None:
        residual.settle()
        if residual.dense is not None:
            self._stand_dense(residual)
        else:
            left, right = joined([tuple(t.to(self.weight.device) for t in pair) for pair in residual.pairs], torch.float32)  # type: ignore[misc]
            self._beside = (left, right)

    @property
    def terms(self) -> tuple[Term, ...] | None:
        """What was added as factors (m, ρ), (ρ, n), to 1e-5 of it; nothing at W0, and None where it is a matrix, see :attr:`residual`."""
        rounded = self.rule == MERGE and self.weight.dtype not in WIDE
        return None if rounded and self.residual is not None else self._terms

    @property
    def residual(self) -> Tensor | None:
        """What is added in effect, (m, n) in float64, the rounding of a merge included; None at W0."""
        if self._beside:
            wide = [t.double() for t in self._beside]
            return wide[0] if len(wide) == 1 else wide[0] @ wide[1]
        if self.rule != MERGE:
            return None
        held = self.weight.detach().to(self._pristine.device)
        return None if torch.equal(held, self._pristine) else out_in(self.base, held.double() - self._pristine.double())

    def move(self, move_base: Callable[[], None], fn: Callable[[Tensor], Tensor]) -> None:
        """Follow the base to another device or dtype; what stands beside it stays float32."""
        shared = self.rule != MERGE or self._pristine.data_ptr() == self.weight.data_ptr()
        move_base()
        self._pristine = self.weight.data if shared else fn(self._pristine)
        self._beside = tuple(t.to(fn(t.new_empty(0)).device) for t in self._beside)
        if self._terms == ():
            self.rule = rule_for(self._hold, self.weight)


RULES: dict[str, Callable[[FrozenPart, Residual], None]] = {
    MERGE: FrozenPart._merge,
    DENSE: FrozenPart._stand_dense,
    FACTORS: FrozenPart._stand_factors,
}
