"""The loop of a run whose rounds may be secure sums."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from flwr.app import Message
from flwr.serverapp import Grid

from fedsb.core.errors import RunError
from fedsb.core.state import Layout, State
from fedsb.wire.messages import Instruction
from strategies.loop import RoundLoop
from strategies.secure_sum import SecureRound, SecureSum, masked_of
from strategies.weighting import Weighting


class SecureLoop(RoundLoop):
    """Rounds, and the exchanges of those that are secure sums.

    Attributes:
        secure: how uploads are summed where the server sees none; None where it sees them.
        weighting: gives each client's weight.
    """

    secure: SecureSum | None = None
    weighting: Weighting
    _secured: SecureRound | None = None

    def _agreed(self, grid: Grid) -> None:
        """Let the cohort exchange keys, where this is a secure sum; who has not done so does not train.

        Raises:
            RunError: too few have.
        """
        if self.secure is None:
            return
        assert self._round is not None
        told = Instruction("", self._round.number, labels=self.labels)
        cohort = self._round.order
        self._secured = SecureRound.begun(self.secure, self.origin, cohort, partial(self.aside, grid), told)
        self._round.order = self._secured.agree(self.counts, self.weighting.weight)
        if len(self._round.order) < (needed := self._needed(len(cohort))):
            missing = ", ".join(client for client in cohort if client not in self._round.order)
            found = f"{len(self._round.order)} of {len(cohort)} clients exchanged keys"
            raise RunError(f"round {self._round.number}: {found}, federation.min_replies={needed} (not {missing})")

    def _unmasked(self, layout: Layout, current: State, replies: Iterable[Message]) -> tuple[State, float]:
        """Return the mean of the uploads, and the sum of their weights.

        Args:
            layout: of an upload.
            current: what the clients were sent of what they upload.
            replies: to the training.

        Raises:
            RunError: too few have arrived, or cannot be unmasked.
        """
        assert self._round is not None
        assert self._secured is not None
        assert self._transport is not None
        for upload in self._uploads(replies, masked_of(lambda client: layout)):
            self._round.note(upload.metrics, self._secured.add(upload))
        self._round.check_quorum(self._needed(self._secured.drawn))
        moved, figures = self._secured.moved(layout)
        self._round.figures = figures
        for client in self._secured.wrong:
            self._transport.roster.remark(
                f"{client}: it gave wrong shares of other clients' keys, and the sum was unmasked by those of others"
            )
        if cut := figures["secure_cut"]:
            self._transport.roster.remark(
                f"{cut:.0f} of the clients' values changed by more than {self._secured.bound:.3g} and were cut to that before they were "
                "summed; raise federation.secure_bound"
            )
        mean = State({name: t + current[name].double() if name in current else t for name, t in moved.items()})
        return mean, self._round.total_weight()
