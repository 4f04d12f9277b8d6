"""The loop of a run: the start, round after round, and what is asked of the clients in between; what a round makes of it is a method's.

Flower's own loop knows no start, no frozen log and no clients by name, so that this one takes its place behind the same ``Strategy.start``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from uuid import uuid4

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedsb.core.blocks import Sight
from fedsb.core.cohort import dispatch_order
from fedsb.core.state import Layout
from fedsb.run.records import CLIENTS, RoundRecord
from fedsb.wire.arrays import decode_state
from fedsb.wire.frozen import FrozenLog
from fedsb.wire.messages import Instruction
from strategies.asking import Questions
from strategies.collecting import collect
from strategies.inbox import Arrived, LayoutOf
from strategies.participation import Listener, Participation
from strategies.roster import Roster
from strategies.rounds import RoundState
from strategies.transport import Ask, Transport

Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]


class RoundLoop(Strategy):
    """Runs a start and rounds over any Flower ``Grid``.

    Args:
        participation: who takes part.
        down: layout of the state that is sent in every round.
        labels: class names in order; clients read their data with them.
        frozen: the frozen log.
        start: runs before round 1 and returns the first arrays; None keeps the initial ones.
        listener: is told each round's record, state and frozen log.

    Attributes:
        rounds_done: what an earlier process has done: None not even the start; otherwise :meth:`start` is given what that led to.
        held: the version of the frozen log that each client holds.
        counts: training examples that each client has.
        counted: the last round whose training by a client counted, by client; empty where no client keeps anything for its next round.
        simulated: whether the clients are; known once they are there.
        enough: tells before each round whether the run is to end without it.
        origin: names the run, over all processes that go on with it.
    """

    def __init__(
        self,
        *,
        participation: Participation,
        down: Layout,
        labels: Sequence[str],
        frozen: FrozenLog,
        start: Callable[..., ArrayRecord] | None,
        listener: Listener | None,
    ) -> None:
        self.participation = participation
        self.down = down
        self.labels = tuple(labels)
        self.frozen = frozen
        self.start_phase = start
        self.listener = listener
        self.rounds_done: int | None = None
        self.held: dict[str, int] = {}
        self.counts: dict[str, int] = {}
        self.counted: dict[str, int] = {}
        self.simulated = True
        self.enough: Callable[[], bool] = lambda: False
        self.origin = uuid4().hex
        self._round: RoundState | None = None
        self._transport: Transport | None = None
        self._timeout, self._last_round = 3600.0, 0

    @property
    def round_clients(self) -> tuple[str, ...]:
        """The cohort of the current round, in dispatch order."""
        return self._round.order if self._round else ()

    def unfinished(self) -> RoundRecord | None:
        """Return the record, so far, of the round in progress."""
        return self._round.record({}) if self._round else None

    @property
    @abstractmethod
    def has_global_model(self) -> bool:
        """Whether the server holds a whole model; where it does not, the mean of the clients' metrics is the run's."""

    @abstractmethod
    def sight_of(self, client: str) -> Sight:
        """Return what a client sees of the factors that the server holds."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Evaluate | None = None,
    ) -> Result:
        """Run the start phase and ``num_rounds`` rounds; see Flower's ``Strategy.start`` for the arguments.

        Raises:
            RunError: no client is connected, or a round had too few valid replies.
        """
        self.summary()
        self._timeout, self._last_round = timeout, num_rounds
        result = Result()
        self.connect(grid)
        arrays = initial_arrays
        if self.rounds_done is None:
            self._round = RoundState(0)
            arrays = self.start_phase(self, grid, arrays) if self.start_phase else arrays
            if not num_rounds:
                self._evaluate(0, grid, arrays, result, evaluate_config)
            self._close(0, arrays, evaluate_fn, result)
        for number in range((self.rounds_done or 0) + 1, num_rounds + 1):
            if self.enough():
                break
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
        self._evaluate(number, grid, updated, result, evaluate)
        return updated

    def _evaluate(self, number: int, grid: Grid, arrays: ArrayRecord, result: Result, config: ConfigRecord | None) -> None:
        """Let clients measure what they hold now."""
        messages = list(self.configure_evaluate(number, arrays, config or ConfigRecord(), grid))
        if messages and (found := self.aggregate_evaluate(number, self._connect(grid).replies(messages, self._timeout))):
            result.evaluate_metrics_clientapp[number] = found

    def _close(self, number: int, arrays: ArrayRecord, evaluate_fn: Evaluate | None, result: Result) -> None:
        """Evaluate on the server and hand the round's record on."""
        metrics = evaluate_fn(number, arrays) if evaluate_fn else None
        if metrics is not None:
            result.evaluate_metrics_serverapp[number] = metrics
        assert self._round is not None
        if metrics is None and not self.has_global_model:
            metrics = result.evaluate_metrics_clientapp.get(number)
            self._round.measured_by = CLIENTS
        self._round.remarks = self._transport.roster.remarks() if self._transport else []
        if self.listener:
            self.listener.end(self._round.record(metrics or {}), decode_state(arrays, self.down), self.frozen)

    def exchange(
        self,
        grid: Grid,
        stage: str,
        arrays: ArrayRecord,
        sent: Layout,
        wanted: Layout,
        *,
        title: str = "",
        kind: str = "train.evidence",
        among: Sequence[str] | None = None,
    ) -> Iterator[Arrived]:
        """Ask clients for one exchange beside the training of a round, and yield their valid replies in dispatch order.

        Args:
            grid: Flower's.
            stage: what is asked for, within the type of the messages.
            arrays: what goes with it.
            sent: its layout.
            wanted: that of the replies.
            title: shown while it goes on; empty for one of a round that is under way, whose pace is that of its training.
            kind: the type of the messages; the default is that of the start, whose bytes are one-off.
            among: who is asked; None: all.

        Raises:
            RunError: fewer valid replies than are needed.
        """
        assert self._round is not None
        transport = self._connect(grid)
        order = dispatch_order(self.participation.clients if among is None else among, self.counts)
        self._round.begin_exchange(order, title)
        instruction = Instruction("", self._round.number, stage=stage, labels=self.labels, digest=sent.digest)
        requests = transport.requests(order, kind, lambda client: (instruction, arrays), self._round.tally)
        replies = transport.replies(transport.address(requests, self._round.failed), self._timeout)
        yield from self._uploads(replies, lambda client: wanted, shown=bool(title))
        self._round.check_quorum(self._needed(len(order)))

    def aside(self, grid: Grid, kind: str, title: str, ask: Ask, wanted: LayoutOf, among: Sequence[str]) -> list[Arrived]:
        """Ask clients for something beside the training of a round that is under way, and return their valid replies.

        Args:
            grid: Flower's.
            kind: the type of the messages; it takes no frozen parts with it.
            title: of it, where a client fails in it.
            ask: gives each client its instruction and its arrays.
            wanted: what each reply must hold.
            among: who is asked.
        """
        assert self._round is not None
        transport = self._connect(grid)
        self._round.begin_aside(among)
        replies = transport.replies(
            transport.address(transport.requests(among, kind, ask, self._round.tally), self._round.failed), self._timeout
        )
        found = list(self._uploads(replies, wanted, training=False, shown=False))
        self._round.end_aside(title)
        return found

    def _needed(self, of: int) -> int:
        assert self._transport is not None
        return self._transport.roster.needed(of)

    def _connect(self, grid: Grid) -> Transport:
        if self._transport is None or self._transport.grid is not grid:
            questions = Questions(self.labels, self._timeout, self.participation.overrides, self.participation.dealt)
            roster = Roster(self.participation, questions, self.counts)
            anew = self.participation.begin_anew
            self._transport = Transport(grid, roster, self.frozen, self.held, self.origin, begin_anew=anew, sight_of=self.sight_of)
        return self._transport

    def _uploads(self, replies: Iterable[Message], layout: LayoutOf, *, training: bool = True, shown: bool = True) -> Iterator[Arrived]:
        assert self._round is not None
        assert self._transport is not None
        return collect(replies, layout, self._round, self._transport, self.listener if shown else None, training=training)
