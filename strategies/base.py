"""The shell that every method shares: who is asked for what, and how what comes back becomes the next round. The method is its rule.

:class:`LowRankStrategy` is a Flower Message-API strategy for any Flower ``Grid``. It addresses logical clients, attaches to each message
exactly the frozen deltas that its client lacks, feeds valid replies to the rule in dispatch order, and measures bytes and exactness. What
is sent, uploaded and logged in which round it reads off the roles of the adapter family.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedsb.adapters import AdapterSpec, Layouts
from fedsb.adapters.held import HeldWeights
from fedsb.adapters.redrawn import Redrawn
from fedsb.core.blocks import Sight
from fedsb.core.cohort import cohort_size, dispatch_order, draw_cohort
from fedsb.core.prints import prints
from fedsb.core.state import Layout, State, squared_norm, subtract
from fedsb.wire.arrays import decode_state, encode_arrays, quantise
from fedsb.wire.frozen import FrozenLog
from fedsb.wire.messages import Instruction
from strategies.combinations import Wanted, check_wanted
from strategies.gap import GapMeter
from strategies.inbox import Arrived
from strategies.method import Following, Method
from strategies.participation import Listener, Participation
from strategies.products import gauge
from strategies.reducers import PlainMean, Reducer
from strategies.rounds import RoundState
from strategies.secure_loop import SecureLoop
from strategies.secure_sum import SecureSum
from strategies.sending import Sending, Shares, carried_roles
from strategies.server_optimizer import ServerOptimizer, server_step
from strategies.transport import Ask

LOG = logging.getLogger(__name__)
Start = Callable[["LowRankStrategy", Grid, ArrayRecord], ArrayRecord]


class LowRankStrategy(Method, SecureLoop):
    """Base of all methods; a subclass gives a rule, over the uploads' mean (:meth:`follow`) or over all of them (:meth:`over_uploads`).

    What a method may be combined with follows from its rule: privacy of whole clients with what needs a mean alone; a server optimiser
    and FedAU's shares with what *is* the mean.

    Args:
        spec: the adapter family.
        layouts: names and shapes of what travels.
        scale: s of the adapters.
        participation: who takes part.
        labels: class names in order; clients read their data with them.
        frozen: the frozen log, already holding the factors that are known, those that everybody makes too; a new one by default.
        server_optimizer: acts on the mean update; None for plain averaging.
        wire_dtype: ``float32``, ``bfloat16`` or ``int8``.
        error_feedback: whether what a wire of int8 leaves out is made up for later, by the clients and by the server.
        start: runs before round 1 and returns the first arrays (a gradient start); None keeps the initial ones.
        secure: sums the uploads where the server is to see none; None where it sees them.
        exactness: whether to measure the exactness gap each round.
        held_weights: the frozen weights, to measure that of what clients compute with too.
        listener: is told each round's record, state and frozen log.

    Raises:
        UserError: what is asked for does not go together with the method.
    """

    def __init__(
        self,
        *,
        spec: AdapterSpec,
        layouts: Layouts,
        scale: float,
        participation: Participation,
        labels: Sequence[str] = (),
        frozen: FrozenLog | None = None,
        server_optimizer: ServerOptimizer | None = None,
        wire_dtype: str = "float32",
        error_feedback: bool = True,
        start: Start | None = None,
        secure: SecureSum | None = None,
        exactness: bool = True,
        held_weights: HeldWeights | None = None,
        listener: Listener | None = None,
    ) -> None:
        super().__init__(
            participation=participation, down=layouts.down, labels=labels, frozen=frozen or FrozenLog(), start=start, listener=listener
        )
        self.spec = spec
        self.layouts = layouts
        self.scale = scale
        self.server_optimizer = server_optimizer
        self.secure = secure
        self.wire_dtype = wire_dtype
        self.sending = Sending(wire_dtype, feedback=error_feedback)
        self.carried = carried_roles(spec, self.anew) if self.sending.keeps else ()
        self.weighting = participation.new_weighting()
        measures, rest = exactness and spec.has_global_model, spec.at_rest(layouts.learnt)
        self.gap = GapMeter(spec, scale, on=measures, weights=held_weights, rest=rest)
        self.lowered: dict[str, int] = {}  # ranks of the clients that have become less than their own
        self._rule: Reducer | None = None
        self._check()

    def _check(self) -> None:
        p = self.participation
        wanted = Wanted(
            p.client_unit is not None, tuple(p.ranks.values()), self.server_optimizer is not None, p.weighting, self.secure is not None
        )
        check_wanted(type(self), self.spec, wanted, type(self).__name__)
        if p.client_unit:
            p.client_unit.check()

    def decode(self, state: State) -> State:
        """Return a state as clients decode it from the wire."""
        return quantise(state, self.wire_dtype)

    def summary(self) -> None:
        """Log what the strategy is set to."""
        p = self.participation
        LOG.info(
            "%s: %d clients, %d a round, weighting %s, wire %s; a client and round %s values up, %d down, and what the log has of them",
            type(self).__name__, len(p.clients), cohort_size(len(p.clients), p.fraction), p.weighting, self.wire_dtype,
            " or ".join(dict.fromkeys(str(layout.numel) for layout in self.layouts.up)), self.down.numel,
        )  # fmt: skip

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Return one message for each connected client of the round's cohort."""
        transport = self._connect(grid)
        p = self.participation
        size = cohort_size(len(p.clients), p.fraction)
        cohort = draw_cohort(p.clients, size, seed=p.seed, round_number=server_round)
        self._round = RoundState(server_round, dispatch_order(cohort, self.counts))
        transport.roster.gather(grid, p.wait, cohort, self._round.failed)
        self._round.order = dispatch_order(cohort, self.counts)
        self._agreed(grid)
        view = self.frozen.view()
        self._sent = view.basis.merge(decode_state(arrays, self.down))
        self._meant = self.sending.meant(self._sent)
        self.sending.begin()
        self._shares = self._shared(arrays, server_round - 1)
        ask = self._asking(server_round, self._shares)
        ask = self._secured.asking(ask) if self._secured else ask
        requests = transport.requests(self._round.order, "train", ask, self._round.tally)
        self._rule = self._round_rule(server_round, cohort)
        self._rule.begin(self._current())
        self.gap.begin(self._sent, view, self.spec.uploaded(server_round))
        return transport.address(requests, self._round.failed)

    def _round_rule(self, server_round: int, cohort: Sequence[str]) -> Reducer:
        private = self.participation.client_unit
        if private:
            return Following(private.mean(cohort, server_round, real=not self.simulated), self, self._meant)
        return self.over_uploads() or Following(PlainMean(), self, self._meant)

    def _current(self) -> State:
        """Return what the clients were meant to be sent of what they upload in this round."""
        assert self._round is not None
        names = {name for name, _ in self.layouts.up_in(self._round.number).shapes}
        return State({name: t for name, t in self._meant.items() if name in names})

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Feed the replies to the rule as they come and return the next arrays.

        Raises:
            RunError: fewer valid replies than the round needs.
        """
        assert self._round is not None
        assert self._rule is not None
        if self._secured:
            self._rule.add(*self._unmasked(self.layouts.up_in(server_round), self._current(), replies))
        for upload, meant, trained in () if self._secured else self._trained(server_round, replies):
            weight = self.weighting.weight(upload.client, upload.num_examples)
            self._rule.add(meant, weight)
            self.gap.add(trained, weight, self.sight_of(upload.client))
            self._round.note(upload.metrics, weight)
            if (lower := self.lower_rank(trained, self.sight_of(upload.client).state(self._sent))) is not None:
                self.lowered[upload.client] = lower
        self._round.check_quorum(self._needed(len(self._round.order)))
        self.counted |= dict.fromkeys(self._round.clients if self.spec.own or self.carried else (), server_round)
        self.weighting.end_round(self._round.clients)
        return encode_arrays(self._finish(), self.wire_dtype), MetricRecord(self._round.train_metrics())

    def _trained(self, server_round: int, replies: Iterable[Message]) -> Iterator[tuple[Arrived, State, State]]:
        """Yield each upload, with what it is from what the server meant to send, and from what its client was sent."""
        for upload in self._uploads(replies, lambda client: self.layouts_of(client).up_in(server_round)):
            layouts = self.layouts_of(upload.client)
            yield upload, *self.sending.trained(upload.state, layouts, layouts.up_in(server_round), self._meant, self._shares)

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Return one evaluation message for each client that is to evaluate, where the configuration asks for it."""
        if self._round is None or not self.participation.evaluates(server_round):
            return []
        transport = self._connect(grid)
        asked = [client for client in self._evaluating(server_round) if client not in self._round.failed]
        requests = transport.requests(asked, "evaluate", self._asking(server_round, self._shared(arrays, server_round)), self._round.tally)
        self._round.begin_aside(asked)
        return transport.address(requests, self._round.failed)

    def _evaluating(self, server_round: int) -> Sequence[str]:
        """Return who evaluates after a round: its cohort, and all clients after the last, so that methods are measured on the same ones."""
        assert self._round is not None
        return dispatch_order(self.participation.clients, self.counts) if server_round == self._last_round else self._round.order

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the clients' metrics, averaged by their numbers of held-out examples; who holds nothing out has none."""
        assert self._round is not None
        for upload in self._uploads(replies, lambda client: Layout(()), training=False):
            self._round.measured(upload.client, upload.metrics, upload.num_examples)
        self._round.end_aside("evaluation")
        return MetricRecord(self._round.client_mean()) if self._round.held_out else None

    @cached_property
    def start_prints(self) -> tuple[float, ...]:
        """What clients hold their own start against, where everybody makes it."""
        return prints(self.frozen.view().basis.pick(*self.spec.made), self.participation.seed)

    def layouts_of(self, client: str) -> Layouts:
        """Return what travels to and from a client."""
        own = self._transport.roster.rank_of(client) if self._transport else self.participation.ranks.get(client)
        return self.layouts.at(self.lowered.get(client, own))

    def sight_of(self, client: str) -> Sight:
        """Return what a client sees of the factors that the server holds."""
        return self.layouts_of(client).sight

    def _shared(self, arrays: ArrayRecord, made_in: int) -> Shares:
        sent = decode_state(arrays, self.down)
        redrawn = Redrawn(self.participation.seed, made_in) if self.redraws else None
        return Shares(self.down, arrays, self.sending.meant(sent), self.wire_dtype, redrawn)

    def _asking(self, round_number: int, shares: Shares) -> Ask:
        """Return what gives each client its instruction and its arrays."""

        def ask(client: str) -> tuple[Instruction, ArrayRecord]:
            layouts, own = self.layouts_of(client), self.counted.get(client, 0)
            share = shares.of(layouts)
            told = Instruction("", round_number, labels=self.labels, digest=share.layout.digest, own=own, carried=self.carried)
            told = replace(told, start=self.start_prints, rank=self.lowered.get(client), ranks=share.ranks, made_in=share.made_in)
            return told, share.arrays

        return ask

    def _finish(self) -> State:
        """Close the rule, take the server's step, measure exactness, append to the log; return the state that is sent next."""
        assert self._round is not None
        assert self._rule is not None
        aggregate = self._rule.finish()
        self._round.extras = {**aggregate.extras, **self._lowered()}
        self._round.diagnostics = dict(getattr(self._rule, "diagnostics", {}))
        mean, lost = self._held_as(aggregate.state), self._round.encoding_error()
        share = self.weighting.share(self._round.total_weight())
        meant = aggregate.state if self.sending.keeps else mean
        stepped = server_step(self._current(), meant, share, self.server_optimizer)
        state = mean if stepped is meant else self._held_as(stepped)
        if state is not mean:
            self._round.extras["server_step"] = squared_norm(subtract(state, mean)) ** 0.5
        self.sending.settle(stepped, State({name: state[name] for name, _ in self.down.shapes if name in state}))
        held = self._sent.merge(mean).merge(aggregate.log)
        self._round.gap, self._round.gap_error = self.gap.measure(held, lost=lost)
        self.frozen.append(aggregate.log.merge(state.pick(*self.spec.in_log)))
        self._round.extras |= {**gauge(self.spec, self.frozen.view().basis.merge(state)), **self.gap.drift(self.frozen.view())}
        self._round.held_gap = self.gap.measure_held(held, self.frozen.view(), lost=lost)
        self._rule = None  # with all the uploads that it may hold
        return State({name: state.get(name, self._sent[name]) for name, _ in self.down.shapes})

    def _lowered(self) -> dict[str, float]:
        """Return how many clients have lowered their ranks, and to which on average."""
        ranks = self.lowered.values()
        return {"lowered": float(len(ranks)), "lowered_rank": sum(ranks) / len(ranks)} if ranks else {}

    def _held_as(self, state: State) -> State:
        """Return a state as clients hold it: rounded for the wire, but for what comes by the log, which travels in float32."""
        logged = State({name: t.float() for name, t in state.items() if name.role in self.spec.in_log})
        return self.decode(State({name: t for name, t in state.items() if name not in logged})).merge(logged)
