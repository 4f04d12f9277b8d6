"""FedASK (arXiv:2507.09990): the mean of the products by two sketches, as two messages of a round; the server never has a client's factors.

What clients send in the first exchange, ``B_i (A_i Ω)``, spans what their products are projected onto in the second (see
:mod:`fedsb.adapters.sketched`), and the projection of the mean is decomposed: its leading pair, in two halves, is what the next round
begins with. Whose second reply is missing does not count: the mean is over those who gave both. With A at rest within a round
(``adapter.options.freeze``) the mean has rank r, and is handed out whole. Otherwise both the width of the sketch and the rank cut it
off: what the rank cuts is in the exactness gap as it is, what the width does by an estimate.

What differs from the paper's code: Ω is drawn anew in each round, and the sketches travel. Under example-level privacy both replies are
functions of what was noised and charged once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from flwr.app import ArrayRecord, Message
from torch import Tensor

from fedsb.core.state import HEAD, Name, State, WeightedSum
from fedsb.wire.arrays import decode_state, encode_arrays
from strategies.base import LowRankStrategy
from strategies.decomposing import Cut, Kept, components, pair
from strategies.inbox import Arrived
from strategies.reducers import Aggregate, PlainMean, Reducer

LOST = "encoding-error"
PROJECTION = "train.projection"


class Projected:
    """The leading pair of the mean of projected products, and the mean head.

    An upload is the head and, as ``A``, a client's ``Zᵀ`` (l, n); the side that multiplies it is everybody's.
    """

    def begin(self, current: State) -> None:
        """Forget the last round."""
        self._mean = PlainMean()
        self._sides = self._before = State()

    def onto(self, sides: State, before: State) -> None:
        """Take the sides (m, l) in float64, role ``B``; ``before`` has the last A (r, n)."""
        self._sides, self._before = sides, before

    def add(self, upload: State, weight: float) -> None:
        """Take one upload."""
        self._mean.add(upload, weight)

    def finish(self) -> Aggregate:
        """Return the mean head, and B and A of every module; for the figures see :meth:`strategies.decomposing.Decomposing.finish`."""
        mean = self._mean.finish().state
        found: dict[Name, Tensor] = {}
        kept = Kept()
        for b, side in self._sides.items():
            a = Name(b.module, "A")
            p, s, q = components(side, mean[a], before := self._before[a])
            rank = Cut().rank(s, len(before))
            kept.add(s, rank, len(before), ())
            found[b], found[a] = pair(p, s, q, len(before), rank, "balanced")
        return Aggregate(mean.pick(HEAD).merge(State(found)), extras=kept.figures(()))


@dataclass(frozen=True)
class First:
    """What the server keeps of a client's first reply until its second one; its sketch is added up."""

    meant: State
    trained: State
    metrics: Mapping[str, float]


class FedASK(LowRankStrategy):
    """Ask for two sketches of the products, and hand out the leading pair of their mean; average the head."""

    anew = ("B", "A")

    @property
    def is_exact(self) -> bool:
        """Whether A rests within a round, so that the mean product has the rank of the pair."""
        return "A" not in self.spec.learn(1)

    def over_uploads(self) -> Reducer:
        """Return the decomposition of the projected mean."""
        self._projected = Projected()
        return self._projected

    def _trained(self, server_round: int, replies: Iterable[Message]) -> Iterator[tuple[Arrived, State, State]]:
        """Yield, of every client that gives both replies, the second one and the head as it came in the first."""
        assert self._round is not None
        assert self._transport is not None
        sketch, ranges, probes, firsts = self.spec.sketch, WeightedSum(), WeightedSum(), dict[str, First]()
        assert sketch is not None
        for reply, meant, trained in super()._trained(server_round, replies):
            ranges.add(reply.state.pick("Y"), self.weighting.weight(reply.client, reply.num_examples))
            firsts[reply.client] = First(meant.pick(HEAD), trained.pick(HEAD), reply.metrics)
        self._round.check_quorum(self._needed(len(self._round.order)))
        asked = self._bases(ranges.mean())
        for second in self.exchange(
            self._transport.grid, "", asked, self.layouts.asked, self.layouts.told, kind=PROJECTION, among=tuple(firsts)
        ):
            first = firsts.pop(second.client)
            probes.add(second.state.pick("P"), self.weighting.weight(second.client, second.num_examples))
            seen = State({Name(name.module, "A"): t.T.contiguous() for name, t in second.state.pick("Z").items()})
            lost = {LOST: first.metrics.get(LOST, 0.0) + second.metrics[LOST]} if LOST in second.metrics else {}
            yield replace(second, metrics={**first.metrics, **lost}), seen.merge(first.meant), seen.merge(first.trained)
        if probes.total_weight:
            self.gap.beside(self.scale**2 * sketch.outside(decode_state(asked, self.layouts.asked), probes.mean()))

    def _bases(self, mean: State) -> ArrayRecord:
        """Return Q as it is sent; rule and gap take it as clients decode it."""
        sketch = self.spec.sketch
        assert sketch is not None
        asked = encode_arrays(sketch.bases(mean), self.wire_dtype)
        sides = sketch.sides(decode_state(asked, self.layouts.asked))
        self._projected.onto(sides, self._sent)
        rest = State({name: t for name, t in self._sent.items() if name.role not in self.spec.factors})
        self.gap.begin(rest.merge(sides), self.frozen.view(), ("A",))
        return asked
