"""How far the weight that clients hold after a round is from the mean of what they trained, computed from factors.

``gap = ‖ΔW_held − Σ w_i ΔW_i‖_F / ‖Σ w_i ΔW_i‖_F`` over all adapted modules and the head, where ``ΔW_i = s · B_i [R_i] A_i`` comes
from the uploads, with the factors that clients held beside, and ``ΔW_held`` is the product of what they hold next plus the residual of this
round. Residuals of earlier rounds are in both and cancel; the head counts as its change since the first round, and so does, in the
denominator, a product that began as a part of W0: that part was not learnt. No m x n matrix is formed.

Where one factor alone is uploaded and clients of smaller ranks hold a block of it, its mean is taken entry by entry over those who hold the
entry, by their weights, and what nobody holds stays: the sum of the exact means of all blocks. At one rank that is ``Σ w_i ΔW_i``.

With two factors uploaded and many uploads the comparison is an estimate by random probes: see :mod:`fedsb.adapters.uploads`. Its relative
standard error is told with it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsb.adapters.held import HeldWeights
from fedsb.adapters.low_rank import Term, low_rank_squared_norm
from fedsb.adapters.masked import pair_seen
from fedsb.adapters.residual import Residual
from fedsb.adapters.spec import AdapterSpec
from fedsb.adapters.uploads import Uploads, ratio_error
from fedsb.core.blocks import WHOLE, Sight, embedded
from fedsb.core.state import HEAD, Name, State, WeightedSum, squared_norm, subtract


@dataclass(frozen=True)
class Gap:
    """Norms of a comparison: of the difference, and of the mean update it is measured against.

    ``error`` is the relative standard error of their ratio where they are estimates; 0 where they are exact.
    """

    difference: float
    update: float
    error: float = 0.0

    @property
    def relative(self) -> float:
        """The exactness gap; 0 where nothing moved and nothing differs."""
        return 0.0 if self.difference == 0 else self.difference / max(self.update, 1e-300)

    def beside(self, estimates: Tensor) -> Gap:
        """Return the gap with a part of the update more, orthogonal to what was compared and missed as a whole: estimates of its square."""
        more = float(estimates.mean())
        difference, update = self.difference**2 + more, self.update**2 + more
        error = 0.5 * float(estimates.std()) / len(estimates) ** 0.5 / max(difference, 1e-300)
        return Gap(difference**0.5, update**0.5, max(self.error, error) if more > 1e-14 * update else self.error)


class ExactnessMeter:
    """Collects a round's uploads and compares their mean product with what is handed out.

    A round in which at most one factor is uploaded is linear in it, so a running sum suffices; with two, the uploads are kept until the
    round ends, or until that would take too long and random probes of their products are kept instead.

    Args:
        spec: the adapter family.
        scale: s.
        start: what changes are measured from: the first head, and ``U``, ``V`` of each module from which its start was taken out of W0.
        kept: modules whose uploads are kept in any case, for :meth:`measure_held`.
    """

    def __init__(self, spec: AdapterSpec, scale: float, start: State, kept: Collection[str] = ()) -> None:
        self._spec = spec
        self._scale = scale
        self._start_head = start.pick(HEAD)
        self._taken_out = start.pick("U", "V")
        self._kept = frozenset(kept)
        self._ends = (spec.factors[0], spec.factors[-1]) if spec.factors else ("", "")
        self.begin(State(), ())

    def begin(self, basis: State, uploaded: Sequence[str]) -> None:
        """Start a round.

        Args:
            basis: factors that clients hold whatever they train, at the server's rank; those that they upload count as uploaded.
            uploaded: roles that they upload.
        """
        self._basis = basis
        self._uploaded = tuple(uploaded)
        self._linear = len(self._uploaded) <= 1
        self._sum = WeightedSum()
        self._uploads = Uploads(self._product, self._ends, self._kept)

    def add(self, upload: State, weight: float, sight: Sight = WHOLE) -> None:
        """Take one upload of a client that sees so much of the factors."""
        if self._linear:
            self._sum.add(self._widened(upload) if sight.layout.shapes else upload, weight)
        else:
            self._sum.add(upload.pick(HEAD), weight)
            self._uploads.add(sight.state(self._basis).merge(upload), weight)

    def measure(self, held: State, *, lost: float = 0.0) -> Gap:
        """Compare with what clients hold next.

        Args:
            held: every factor as clients will decode it, the head, and what this round adds to the frozen weights (roles U, V). A factor
                that begins anew in each round is not there: at its start the product is zero.
            lost: weighted mean of ``‖ΔW_i − ΔW_i as decoded‖_F``, which a coarse wire took from the uploads before they came here;
                it is added to the difference, an upper bound by the triangle inequality.
        """
        mean = self._mean()
        by_head = self._head_squares(mean, held)
        difference, update = (torch.tensor([value], dtype=torch.float64) for value in by_head)
        for module in self._modules(mean):
            apart, whole = self._compared(module, mean, held)
            difference, update = difference + apart, update + whole
        return Gap(float(difference.mean()) ** 0.5 + lost, float(update.mean()) ** 0.5, ratio_error(difference, update))

    def _compared(self, module: str, mean: State, held: State) -> tuple[Tensor | float, Tensor | float]:
        if not self._linear:
            return self._uploads.compare(module, self._given(module, held), self._begun(module))
        wanted = self._wanted(module, mean)
        update = low_rank_squared_norm([*wanted, *self._begun(module)])
        if self._differs_in_one(module, held):
            return self._linear_difference(module, mean, held), update
        return low_rank_squared_norm(_minus(self._given(module, held), wanted)), update

    def measure_held(self, held: State, weights: HeldWeights, residuals: Mapping[str, Residual], *, lost: float = 0.0) -> Gap:
        """Compare the weights that clients will compute with, rounded as they are, over the modules that ``weights`` holds and the head.

        Args:
            held: as clients will decode it.
            weights: the frozen ones, told of this round's beginning.
            residuals: what clients will add to them, with this round's share.
            lost: see :meth:`measure`; of all modules, and so an upper bound for a sample too.
        """
        mean = self._mean()
        difference, update = self._head_squares(mean, held)
        for module in weights.modules:
            wanted = self._wanted(module, mean)
            difference += weights.squared_difference(module, residuals, _minus(self._held_product(module, held), wanted))
            update += low_rank_squared_norm([*wanted, *self._begun(module)])
        return Gap(difference**0.5 + lost, update**0.5)

    def _widened(self, upload: State) -> State:
        """Return an upload at the server's rank: what a client of a smaller one does not hold adds nothing to its weight."""
        return State({name: embedded(t, self._basis.get(name, t), self._spec.block, name.role) for name, t in upload.items()})

    def _modules(self, mean: State) -> Sequence[str]:
        return mean.modules if self._linear else self._uploads.modules

    def _differs_in_one(self, module: str, held: State) -> bool:
        """Tell whether what is held differs from what was, but for the one factor that was uploaded, in nothing."""
        others = [Name(module, role) for role in self._spec.factors if role not in self._uploaded]
        return self._linear and Name(module, "U") not in held and all(held.get(name) is self._basis.get(name) for name in others)

    def _given(self, module: str, held: State) -> list[Term]:
        product, left, right = self._held_product(module, held), Name(module, "U"), Name(module, "V")
        return [*product, pair_seen(self._spec, module, (held[left], held[right]), self._basis)] if left in held else product

    def _held_product(self, module: str, held: State) -> list[Term]:
        whole = all(Name(module, role) in held for role in self._spec.factors)
        return [self._product(module, held, 1.0)] if whole else []

    def _begun(self, module: str) -> list[Term]:
        """Return what takes a module's start out of its product again."""
        left, right = Name(module, "U"), Name(module, "V")
        return [(self._taken_out[left], self._taken_out[right])] if left in self._taken_out else []

    def _mean(self) -> State:
        return self._sum.mean() if self._sum.total_weight and (self._linear or len(self._start_head)) else State()

    def _head_squares(self, mean: State, held: State) -> tuple[float, float]:
        head = mean.pick(HEAD)
        return squared_norm(subtract(head, held)), squared_norm(subtract(head, self._start_head))

    def _wanted(self, module: str, mean: State) -> list[Term]:
        if self._linear:
            return [self._product(module, mean, 1.0)]
        return self._uploads.terms(module)

    def _linear_difference(self, module: str, mean: State, held: State) -> float:
        name = Name(module, self._uploaded[0])
        change = State({name: held[name].double() - mean[name].double()})
        return low_rank_squared_norm([self._product(module, change, 1.0)])

    def _product(self, module: str, state: State, weight: float) -> Term:
        names = [Name(module, role) for role in self._spec.factors]
        left, right = self._spec.split(tuple((state[name] if name in state else self._basis[name]).double() for name in names))
        return left * (self._scale * weight), right


def _minus(given: Sequence[Term], wanted: Sequence[Term]) -> list[Term]:
    return [*given, *((-left, right) for left, right in wanted)]


def encoding_error(upload: State, decoded: State, spec: AdapterSpec, scale: float, basis: State) -> float:
    """Return ``‖ΔW − ΔW as decoded‖_F`` of one upload, head included: what the wire's dtype takes away."""
    meter = ExactnessMeter(spec, scale, upload)
    meter.begin(basis, sorted({name.role for name in upload} - {HEAD}))
    meter.add(upload, 1.0)
    return meter.measure(basis.merge(decoded)).difference
