"""Replies in, valid uploads out in dispatch order: a reorder buffer that drops what is broken and says why."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Message

from fedsb.core.errors import RunError
from fedsb.core.logs import last_line
from fedsb.core.state import Layout, State, non_finite
from fedsb.node.refusals import shown
from fedsb.privacy.codes import BY_NUMBER, UNKNOWN
from fedsb.wire.arrays import LayoutError
from fedsb.wire.messages import decode_reply

LOG = logging.getLogger(__name__)
LayoutOf = Callable[[str], Layout]  # what a client's reply must hold
# What the server averages over clients: one NaN would hide what the others say.
MEANS = ("loss", "encoding-error")


@dataclass(frozen=True)
class Arrived:
    """What came of a valid reply."""

    client: str
    state: State
    num_examples: int
    metrics: Mapping[str, float]


class Inbox:
    """Holds early replies until every client before them in the order has answered or failed.

    Args:
        order: clients in dispatch order.
        layout: what each client's reply must hold.
        failed: clients already known to fail; the inbox adds to it.
        count_of: takes a client and the number of its examples, and tells what is wrong with that.
        least: number of examples that a reply may be of.
    """

    def __init__(
        self,
        order: Sequence[str],
        layout: LayoutOf,
        failed: dict[str, str],
        count_of: Callable[[str, int], str] | None = None,
        *,
        least: int = 1,
    ) -> None:
        self._order = list(order)
        self._layout = layout
        self._failed = failed
        self._count_of = count_of
        self._least = least
        self._early: dict[str, Arrived] = {}

    def put(self, client: str, reply: Message) -> Iterator[Arrived]:
        """Take a reply and yield the uploads whose turn has come."""
        try:
            upload = self._read(client, reply)
            if self._count_of and (wrong := self._count_of(client, upload.num_examples)):
                raise LayoutError(wrong)
            self._early[client] = upload
        except LayoutError as error:
            self._drop(client, str(error))
        except RunError as error:
            self._stop(client, str(error))
            raise
        yield from self._due()

    def rest(self) -> Iterator[Arrived]:
        """Count the clients that never answered as failed, and yield what was waiting behind them."""
        for client in self._order:
            if client not in self._early and client not in self._failed:
                self._drop(client, "no reply in time")
        yield from self._due()

    def _due(self) -> Iterator[Arrived]:
        while self._order and (self._order[0] in self._early or self._order[0] in self._failed):
            client = self._order.pop(0)
            if client in self._early:
                yield self._early.pop(client)

    def _read(self, client: str, reply: Message) -> Arrived:
        if reply.has_error():
            raise LayoutError(f"error {reply.error.code}: {last_line(reply.error.reason)}")
        answer = decode_reply(reply.content)
        if answer.code:
            raise _coded(client, answer.code, answer.key)
        if answer.missing:
            raise LayoutError("lacks frozen state although it was sent all of it")
        state = answer.state(self._layout(client))
        # Two tests of a packed state cost a tenth of one for each of its tensors.
        if not answer.finite and (broken := non_finite(state)):
            raise LayoutError(f"{broken.role} of '{broken.module}' holds NaN or infinity")
        if answer.num_examples < self._least:
            raise LayoutError(f"num-examples is {answer.num_examples}, expected at least {self._least}")
        for key in MEANS:
            if not math.isfinite(answer.metrics.get(key, 0.0)):
                raise LayoutError(f"{key} is {answer.metrics[key]}")
        return Arrived(client, state, answer.num_examples, answer.metrics)

    def _stop(self, client: str, reason: str) -> None:
        """Count every client whose upload was not handed out as failed: it was asked, and its ledger may have been charged."""
        self._drop(client, reason)
        for other in self._order:
            self._failed.setdefault(other, "the run stopped before its reply counted")

    def _drop(self, client: str, reason: str) -> None:
        self._failed[client] = reason
        LOG.warning("reply of %s dropped: %s", client, reason)


def _coded(client: str, code: int, key: str) -> Exception:
    text = shown(code, key)
    return RunError(f"{client}: {text}") if BY_NUMBER.get(code, UNKNOWN).stops else LayoutError(text)
