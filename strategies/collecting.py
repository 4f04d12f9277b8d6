"""Replies of an exchange in, valid uploads out, while the round and whoever listens are told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from flwr.app import Message

from strategies.inbox import Arrived, Inbox, LayoutOf
from strategies.participation import Listener
from strategies.rounds import RoundState
from strategies.transport import Transport


def collect(
    replies: Iterable[Message], layout: LayoutOf, under_way: RoundState, transport: Transport, listener: Listener | None, *, training: bool
) -> Iterator[Arrived]:
    """Yield valid replies in dispatch order; note the others as failed.

    Args:
        replies: as they come.
        layout: what each client's reply must hold.
        under_way: the round; its cohort is whom replies are expected from.
        transport: knows whose a reply is.
        listener: is told of each.
        training: whether replies tell the number of training examples, which a client must not change.
    """
    count_of = transport.roster.count_of if training else None
    # Nothing may be held out of a few examples.
    inbox = Inbox(under_way.order, layout, under_way.failed, count_of, least=int(training))
    if listener:
        listener.begin(under_way.number, under_way.order, under_way.stage)
    for reply in replies:
        client = transport.client_of(reply)
        if client is None:
            continue
        yield from _accepted(inbox.put(client, reply), under_way)
        if listener:
            listener.reply(client, client not in under_way.failed)
    yield from _accepted(inbox.rest(), under_way)


def _accepted(uploads: Iterable[Arrived], under_way: RoundState) -> Iterator[Arrived]:
    for upload in uploads:
        under_way.accept(upload.client, upload.metrics)
        yield upload
