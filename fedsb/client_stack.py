"""Several training messages in one call: clients side by side over one frozen model, each with the reply that it would give alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message
from torch import Tensor

from clients.round import Round, Upload
from fedsb.app.answering import coded
from fedsb.app.answers import app, faults_of
from fedsb.app.client_job import Job
from fedsb.core.devices import on_host
from fedsb.core.state import State
from fedsb.models.fit import Lesson
from fedsb.runtime.grid import TRAIN, answered
from fedsb.runtime.process_memory import keep_large_blocks
from fedsb.stack.stack import Stack
from fedsb.tasks.task import Batch
from fedsb.wire.arrays import LayoutError

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seat:
    """A message whose client can take part in a stack."""

    message: Message
    context: Context
    job: Job


@dataclass(frozen=True)
class Pupil:
    """A client in the stack.

    Attributes:
        lesson: its training; None where it has a reply that went out and cannot train again.
        kept: the reply that went out before. It trains again, to nobody's use but the others': beside fewer than before their last bits
            would be other ones.
    """

    lesson: Lesson[Any] | None
    kept: Upload | None = None


def answer_together(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
    """Answer training messages, in their order.

    A client that is to suffer a fault trains alone, and so does one that starts from another state than every other (of another rank, say);
    and all do where they cannot be computed together.
    """
    replies: dict[int, Message] = {}
    seats: dict[int, Seat] = {}
    for i, (message, context) in enumerate(zip(messages, contexts, strict=True)):
        found = _seated(message, context)
        if isinstance(found, Seat):
            seats[i] = found
        elif found is not None:
            replies[i] = found
    for group in _alike(seats) if len(seats) > 1 else []:
        try:
            replies |= dict(zip(group, _side_by_side(list(group.values())), strict=True))
        except Exception as error:  # whose fault it is shows when each trains alone
            LOG.warning("clients side by side failed, each trains alone now: %s", error)
    return [
        replies[i] if i in replies else answered(app, message, context)
        for i, (message, context) in enumerate(zip(messages, contexts, strict=True))
    ]


def _seated(message: Message, context: Context) -> Seat | Message | None:
    """Return a message's seat, the reply of a client that cannot take part, or None for one that must be alone."""
    seat: list[Seat] = []

    def sit() -> Message:
        faults = faults_of(message, context)
        if faults is None or not faults.any:
            job = Job(message, context)
            _ = job.frozen, job.own, job.round  # what is wrong with its cache, disk or ledger is its own
            seat.append(Seat(message, context, job))
        return message

    if message.metadata.message_type != TRAIN:
        return None
    reply = answered(lambda m, c: coded(m, c, sit), message, context)
    if seat:
        return seat[0]
    return None if reply is message else reply


def _alike(seats: Mapping[int, Seat]) -> list[dict[int, Seat]]:
    """Return the groups of several clients that start from the same state over the same model."""
    groups: list[dict[int, Seat]] = []
    for i, seat in seats.items():
        try:
            group = next((group for group in groups if _start_alike(seat.job, next(iter(group.values())).job)), None)
        except LayoutError:  # it says so itself, alone
            continue
        if group is None:
            groups.append({i: seat})
        else:
            group[i] = seat
    return [group for group in groups if len(group) > 1]


def _start_alike(job: Job, first: Job) -> bool:
    return (
        job.adapted is first.adapted
        and job.config == first.config
        and job.instruction.frozen == first.instruction.frozen
        and job.instruction.round == first.instruction.round
        and job.rank == first.rank
        and _same(job.sent_down, first.sent_down)
    )


def _same(one: State, other: State) -> bool:
    return all(
        a is b or np.shares_memory(a.numpy(), b.numpy()) or torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True)
    )


def _side_by_side(seats: Sequence[Seat]) -> list[Message]:
    # Opacus takes seconds to import: only where it is needed.
    from clients.stacked import taught_together

    first = seats[0].job
    keep_large_blocks(first.adapted.device)
    first.adapted.install(first.state(), first.frozen, first.instruction.round)
    rounds = [seat.job.round for seat in seats]
    stack = Stack(first.adapted, [each.dropout for each in rounds], [seat.job.own for seat in seats])
    pupils = [_pupil(each, stack, i) for i, each in enumerate(rounds)]
    present = {i: pupil for i, pupil in enumerate(pupils) if isinstance(pupil, Pupil)}
    wanted = any(pupil.kept is None for pupil in present.values())
    lessons = {i: pupil.lesson for i, pupil in present.items() if wanted and pupil.lesson is not None}
    results = taught_together(stack, first.task, lessons, train=first.config.train, private=rounds[0].by_example)

    def upload(i: int) -> Upload:
        pupil, result = pupils[i], results.get(i)
        if isinstance(pupil, Pupil) and pupil.kept is not None:
            return pupil.kept
        for failed in (pupil, result):
            if isinstance(failed, Exception):
                raise failed
        return rounds[i].close(on_host(stack.members[i]), result)

    def reply(i: int, seat: Seat) -> Message:
        return answered(lambda m, c: coded(m, c, lambda: Message(seat.job.reply(upload(i)), reply_to=m)), seat.message, seat.context)

    return [reply(i, seat) for i, seat in enumerate(seats)]


def _pupil(opened: Round[Any], stack: Stack, member: int) -> Pupil | Exception:
    """Open a client's round; what is wrong with it is its own, and the others train."""
    kept: Upload | None = None
    try:
        kept = opened.open()
        lesson = opened.lesson(stack.members[member], lambda batch: stack.forward_of(member, lambda: _outputs(opened, batch)))
    except Exception as error:
        if kept is None:
            return error
        # What went out goes out again, whatever becomes of the company.
        LOG.warning("'%s' does not train again beside the others, who may end in other last bits: %s", opened.site.client, error)
        return Pupil(None, kept)
    return Pupil(lesson, kept)


def _outputs(opened: Round[Any], batch: Batch) -> Tensor:
    return opened.task.forward(opened.adapted.model, batch)
