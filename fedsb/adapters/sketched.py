"""Products that reach the server as two sketches, in two exchanges of one round, and never as factors.

A client that has trained ``U V`` (m x ρ times ρ x n) first sends ``Y = U (V Ω)`` (m, l), with Ω drawn by everybody from seed and round.
The server answers with Q, an orthonormal basis of the mean of Y, and is sent ``Z = Vᵀ (Uᵀ Q)`` (n, l). Both are linear in the client's
product, so that ``Q (Qᵀ Q)⁻¹ Z̄ᵀ`` is the mean product's projection onto the range of Q (Halko, Martinsson and Tropp 2011,
arXiv:0909.4061): all of it where l is at least its rank. Q is taken as the wire has left it, no longer quite orthonormal.

How much lies outside that range neither sketch can tell. A few columns ``P = U (V Ω')`` that took no part in the choice of Q do, by
``E ‖D ω‖² = ‖D‖_F²`` for Gaussian ω; they come with Z.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsb.adapters.geometry import Geometry, Shapes
from fedsb.adapters.low_rank import low_rank_squared_norm
from fedsb.core.rng import torch_generator
from fedsb.core.state import Name, State

PROBES = 4  # columns of P


@dataclass(frozen=True)
class Sketched:
    """How wide the sketches are.

    Attributes:
        oversample: columns beyond the rank; l is at most min(m, n).
    """

    oversample: int

    def shapes(self, m: int, n: int, rank: int) -> Shapes:
        """Return the shapes of Y (m, l), Q (m, l), Z (n, l) and P (m, :data:`PROBES`)."""
        width = min(rank + self.oversample, m, n)
        return {"Y": (m, width), "Q": (m, width), "Z": (n, width), "P": (m, PROBES)}

    def ranges(self, spec: Geometry, factors: State, seed: int, round_number: int) -> State:
        """Return Y of every module of a client's factors, in float32."""
        found = {}
        for module, (left, right) in _products(spec, factors).items():
            (_, width) = self.shapes(len(left), right.shape[1], left.shape[1])["Y"]
            found[Name(module, "Y")] = _image(left, right, width, torch_generator(seed, "round sketch", module, round_number))
        return State(found)

    @staticmethod
    def bases(mean: State) -> State:
        """Return Q of every module from the mean of Y, in float32."""
        return State({Name(name.module, "Q"): torch.linalg.qr(t.double()).Q.float() for name, t in mean.pick("Y").items()})

    @staticmethod
    def projections(spec: Geometry, factors: State, bases: State, seed: int, round_number: int) -> State:
        """Return Z and P of every module, in float32."""
        found = {}
        for module, (left, right) in _products(spec, factors).items():
            found[Name(module, "Z")] = (right.T @ (left.T @ bases[Name(module, "Q")].double())).float()
            found[Name(module, "P")] = _image(left, right, PROBES, torch_generator(seed, "round probes", module, round_number))
        return State(found)

    @staticmethod
    def sides(bases: State) -> State:
        """Return ``Q (Qᵀ Q)⁻¹`` (m, l) of every module in float64, role ``B``: what Zᵀ is multiplied by."""
        wide = {name.module: t.double() for name, t in bases.pick("Q").items()}
        return State({Name(module, "B"): torch.linalg.solve(q.T @ q, q.T).T.contiguous() for module, q in wide.items()})

    def outside(self, bases: State, mean: State) -> Tensor:
        """Return estimates (:data:`PROBES`,) of the squared norm, over all modules, of what lies outside the ranges; from the mean of P."""
        sides, total = self.sides(bases), torch.zeros(PROBES, dtype=torch.float64)
        for (module, _), p in mean.pick("P").items():
            within = sides[Name(module, "B")] @ (bases[Name(module, "Q")].double().T @ p.double())
            total += (p.double() - within).square().sum(0)
        return total

    def rounded(self, bases: State, sent: State, decoded: State) -> float:
        """Return the norm over all modules of what the rounding of Z does to a client's projection; without s."""
        sides = self.sides(bases)
        terms = [(sides[Name(name.module, "B")], (t - decoded[name]).double().T) for name, t in sent.pick("Z").items()]
        return float(sum(low_rank_squared_norm([term]) for term in terms) ** 0.5)


def _image(left: Tensor, right: Tensor, width: int, stream: torch.Generator) -> Tensor:
    """Return the product of ``left @ right`` with a Gaussian (n, width), in float32."""
    return (left @ (right @ torch.randn(right.shape[1], width, generator=stream, dtype=torch.float64))).float()


def _products(spec: Geometry, factors: State) -> dict[str, tuple[Tensor, Tensor]]:
    return {m: spec.split(tuple(factors[Name(m, role)].double() for role in spec.factors)) for m in factors.modules}
