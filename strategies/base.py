"""The shell that every method shares: rounds, clients, wire and records. The method itself is its reducer.

:class:`LowRankStrategy` is a Flower Message-API strategy for any Flower ``Grid``. It addresses logical clients, attaches to each message
exactly the frozen deltas that its client lacks, feeds valid replies to the reducer in dispatch order, and measures bytes and exactness.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedsb.adapters import AdapterSpec
from fedsb.adapters.held import HeldWeights
from fedsb.core.cohort import cohort_size, dispatch_order, draw_cohort
from fedsb.core.state import Layout, State, squared_norm, subtract, unpack
from fedsb.run.records import RoundRecord
from fedsb.wire.arrays import decode_arrays, encode_arrays, quantise
from fedsb.wire.frozen import FrozenLog
from fedsb.wire.messages import Instruction
from strategies.asking import Questions
from strategies.collecting import collect
from strategies.gap import GapMeter
from strategies.inbox import Upload
from strategies.participation import Listener, Participation
from strategies.reducers import Reducer
from strategies.roster import Roster
from strategies.rounds import RoundState
from strategies.server_optimizer import ServerOptimizer, server_step
from strategies.transport import Transport

LOG = logging.getLogger(__name__)
Start = Callable[["LowRankStrategy", Grid, ArrayRecord], ArrayRecord]


class LowRankStrategy(Strategy):
    """Base of all methods; a subclass gives the reducer.

    Args:
        spec: the adapter family.
        layout: names and shapes of what is trained and travels.
        scale: s of the adapters.
        participation: who takes part.
        labels: class names in order; clients read their data with them.
        frozen: the frozen log, already holding a data-free basis; a new one by default.
        server_optimizer: acts on the mean update; None for plain averaging.
        wire_dtype: ``float32`` or ``bfloat16``.
        start: runs before round 1 and returns the first arrays (a gradient start); None keeps the initial ones.
        exactness: whether to measure the exactness gap each round.
        held_weights: the frozen weights, to measure that of what clients compute with too.
        listener: is told each round's record, state and frozen log.
    """

    sums_uploads: ClassVar[bool] = False  # whether the next state follows from the sum of the uploads alone, as client-level privacy needs

    def __init__(
        self,
        *,
        spec: AdapterSpec,
        layout: Layout,
        scale: float,
        participation: Participation,
        labels: Sequence[str] = (),
        frozen: FrozenLog | None = None,
        server_optimizer: ServerOptimizer | None = None,
        wire_dtype: str = "float32",
        start: Start | None = None,
        exactness: bool = True,
        held_weights: HeldWeights | None = None,
        listener: Listener | None = None,
    ) -> None:
        self.spec = spec
        self.layout = layout
        self.scale = scale
        if participation.client_privacy:
            participation.client_privacy.check(type(self).__name__, self.sums_uploads)
        self.participation = participation
        self.weighting = participation.new_weighting()
        self.labels = tuple(labels)
        self.frozen = frozen or FrozenLog()
        self.server_optimizer = server_optimizer
        self.wire_dtype = wire_dtype
        self.start_phase = start
        self.listener = listener
        self.gap = GapMeter(spec, scale, on=exactness, weights=held_weights)
        self.rounds_done: int | None = None  # None: not even the start; otherwise `start` is given what they led to
        self.held: dict[str, int] = {}  # the version of the frozen log that each client holds
        self.counts: dict[str, int] = {}  # training examples that each client has
        self._reducer: Reducer | None = None
        self._round: RoundState | None = None
        self._transport: Transport | None = None
        self._timeout = 3600.0
        self.simulated = True

    @abstractmethod
    def new_reducer(self) -> Reducer:
        """Return the method's rule."""

    @classmethod
    def residual_rank(cls, cohort: int, rank: int, *, coarse: bool) -> int:
        """Return the rank of what a round of ``cohort`` clients adds to a module's W0; ``coarse`` if the wire rounds float32."""
        return 0

    def decode(self, state: State) -> State:
        """Return a state as clients decode it from the wire."""
        return quantise(state, self.wire_dtype)

    @property
    def round_clients(self) -> tuple[str, ...]:
        """The cohort of the current round, in dispatch order."""
        return self._round.order if self._round else ()

    def unfinished(self) -> RoundRecord | None:
        """Return the record, so far, of the round in progress."""
        return self._round.record({}) if self._round else None

    def summary(self) -> None:
        """Log what the strategy is set to."""
        p = self.participation
        LOG.info(
            "%s: %d clients, %d a round, weighting %s, wire %s, %d values a client and direction",
            type(self).__name__, len(p.clients), cohort_size(len(p.clients), p.fraction), p.weighting, self.wire_dtype, self.layout.numel,
        )  # fmt: skip

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Return one message for each connected client of the round's cohort."""
        transport = self._connect(grid)
        p = self.participation
        size = cohort_size(len(p.clients), p.fraction)
        cohort = draw_cohort(p.clients, size, seed=p.seed, round_number=server_round)
        self._round = RoundState(server_round, dispatch_order(cohort, self.counts))
        transport.roster.gather(grid, p.wait, cohort, self._round.failed)
        self._round.order = order = dispatch_order(cohort, self.counts)
        self._current = unpack(decode_arrays(arrays), self.layout)
        requests = transport.requests(order, "train", self._instruction(server_round), arrays, self._round.tally)
        private = p.client_privacy
        self._reducer = private.reducer(self.decode, cohort, server_round, real=not self.simulated) if private else self.new_reducer()
        self._reducer.begin(self._current)
        self.gap.begin(self.frozen.view().basis, self._current, self.frozen.view().residuals)
        return transport.address(requests, self._round.failed)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Feed the replies to the reducer as they come and return the next arrays.

        Raises:
            RunError: fewer valid replies than the round needs.
        """
        assert self._round is not None
        assert self._reducer is not None
        for upload in self._uploads(replies, self.layout):
            weight = self.weighting.weight(upload.client, upload.num_examples)
            self._reducer.add(upload.state, weight)
            self.gap.add(upload.state, weight)
            self._round.note(upload.metrics, weight)
        self._round.check_quorum(self._needed(len(self._round.order)))
        self.weighting.end_round(self._round.clients)
        return encode_arrays(self._finish(), self.wire_dtype), MetricRecord(self._round.train_metrics())

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Return one evaluation message for each client of the cohort, where the configuration asks for it."""
        if self._round is None or not self.participation.evaluates(server_round):
            return []
        transport = self._connect(grid)
        asked = [client for client in self._round.order if client not in self._round.failed]
        requests = transport.requests(asked, "evaluate", self._instruction(server_round), arrays, self._round.tally)
        self._round.begin_evaluation(asked)
        return transport.address(requests, self._round.failed)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the clients' metrics, averaged by their numbers of held-out examples."""
        assert self._round is not None
        counts: dict[str, int] = {}
        for upload in self._uploads(replies, Layout(()), training=False):
            self._round.client_metrics[upload.client] = dict(upload.metrics)
            counts[upload.client] = upload.num_examples
        self._round.end_evaluation()
        return MetricRecord(self._round.client_mean(counts)) if counts else None

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the start phase and ``num_rounds`` rounds; see Flower's ``Strategy.start`` for the arguments.

        Raises:
            RunError: no client is connected, or a round had too few valid replies.
        """
        self.summary()
        self._timeout = timeout
        result = Result()
        self.connect(grid)
        arrays = initial_arrays
        if self.rounds_done is None:
            self._round = RoundState(0)
            arrays = self.start_phase(self, grid, arrays) if self.start_phase else arrays
            self._close(0, arrays, evaluate_fn, result)
        for number in range((self.rounds_done or 0) + 1, num_rounds + 1):
            arrays = self._run_round(number, grid, arrays, result, train_config, evaluate_config)
            self._close(number, arrays, evaluate_fn, result)
        result.arrays = arrays
        return result

    def connect(self, grid: Grid) -> Roster:
        """Wait for the clients and return who serves them; RunError where too few come in time."""
        roster = self._connect(grid).roster
        roster.wait(grid, self.participation.wait)
        self.simulated = not roster.real
        return roster

    def _run_round(
        self, number: int, grid: Grid, arrays: ArrayRecord, result: Result, train: ConfigRecord | None, evaluate: ConfigRecord | None
    ) -> ArrayRecord:
        transport = self._connect(grid)
        messages = list(self.configure_train(number, arrays, train or ConfigRecord(), grid))
        updated, metrics = self.aggregate_train(number, transport.replies(messages, self._timeout))
        assert updated is not None
        assert metrics is not None
        result.train_metrics_clientapp[number] = metrics
        messages = list(self.configure_evaluate(number, updated, evaluate or ConfigRecord(), grid))
        if messages and (evaluated := self.aggregate_evaluate(number, transport.replies(messages, self._timeout))):
            result.evaluate_metrics_clientapp[number] = evaluated
        return updated

    def _close(
        self, number: int, arrays: ArrayRecord, evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None, result: Result
    ) -> None:
        """Evaluate on the server and hand the round's record on."""
        metrics = evaluate_fn(number, arrays) if evaluate_fn else None
        if metrics is not None:
            result.evaluate_metrics_serverapp[number] = metrics
        assert self._round is not None
        self._round.remarks = self._transport.roster.remarks() if self._transport else []
        if self.listener:
            self.listener.end(self._round.record(metrics or {}), unpack(decode_arrays(arrays), self.layout), self.frozen)

    def exchange(self, grid: Grid, stage: str, arrays: ArrayRecord, sent: Layout, wanted: Layout, *, title: str = "") -> Iterator[Upload]:
        """Ask all connected clients for one exchange of the start, and yield their valid replies in dispatch order.

        ``arrays`` goes with it, of layout ``sent``; replies have layout ``wanted``. ``title`` is shown while it goes on.
        """
        assert self._round is not None
        transport = self._connect(grid)
        order = dispatch_order(self.participation.clients, self.counts)
        self._round.begin_exchange(order, title)
        instruction = Instruction("", 0, stage=stage, labels=self.labels, digest=sent.digest)
        requests = transport.requests(order, "train.evidence", instruction, arrays, self._round.tally)
        yield from self._uploads(transport.replies(transport.address(requests, self._round.failed), self._timeout), wanted)
        self._round.check_quorum(self._needed(len(order)))

    def _needed(self, of: int) -> int:
        assert self._transport is not None
        return self._transport.roster.needed(of)

    def _instruction(self, round_number: int) -> Instruction:
        return Instruction("", round_number, labels=self.labels, digest=self.layout.digest)

    def _connect(self, grid: Grid) -> Transport:
        if self._transport is None or self._transport.grid is not grid:
            questions = Questions(self.labels, self._timeout, self.participation.overrides)
            roster = Roster(self.participation, questions, self.counts)
            self._transport = Transport(grid, roster, self.frozen, self.held)
        return self._transport

    def _uploads(self, replies: Iterable[Message], layout: Layout, *, training: bool = True) -> Iterator[Upload]:
        assert self._round is not None
        assert self._transport is not None
        return collect(replies, layout, self._round, self._transport, self.listener, training=training)

    def _finish(self) -> State:
        """Close the reducer, measure exactness, take the server's step, append the residual."""
        assert self._round is not None
        assert self._reducer is not None
        aggregate = self._reducer.finish()
        mean = aggregate.state
        self._round.extras = dict(aggregate.extras)
        self._round.diagnostics = dict(getattr(self._reducer, "diagnostics", {}))
        self._round.gap = self.gap.measure(mean, aggregate.residual, lost=self._round.encoding_error())
        state = server_step(self._current, mean, self.weighting.share(self._round.total_weight()), self.server_optimizer)
        if state is not mean:
            state = self.decode(state)
            self._round.extras["server_step"] = squared_norm(subtract(state, mean)) ** 0.5
        self.frozen.append(aggregate.residual)
        self._round.held_gap = self.gap.measure_held(mean, self.frozen.view().residuals, lost=self._round.encoding_error())
        return state
