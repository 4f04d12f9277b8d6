"""Clients of the tests of runtimes, in an actor's process: they do what a message says."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ray
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict

LOG = logging.getLogger("clients.obedient")


def obey(message: Message, context: Context) -> Message:
    """Do what ``do`` names, with ``with`` as its argument; answer with the process, the node and what came along."""
    config: ConfigRecord = message.content.config_records["config"]
    DEEDS[str(config["do"])](str(config["with"]))
    came = sum(len(array.data) for record in message.content.array_records.values() for array in record.values())
    answer = MetricRecord({"pid": os.getpid(), "node": message.metadata.dst_node_id, "bytes": came, "number": config["number"]})  # type: ignore[dict-item]
    return Message(
        RecordDict({"metrics": answer, "config": ConfigRecord({"overrides": str(context.run_config["overrides"])})}), reply_to=message
    )


def obey_all(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
    """Obey several at once."""
    return [obey(message, context) for message, context in zip(messages, contexts, strict=True)]


def cards() -> tuple[str, str]:
    """Return the cards of the actor that runs this: as Ray reserved them, and as torch may see them."""
    reserved = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    return ",".join(reserved), os.environ.get("CUDA_VISIBLE_DEVICES", "all")


class Holder:
    """Holds CPUs."""


def _die(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_once(path: str) -> None:
    if not Path(path).exists():
        Path(path).touch()
        _die(path)


def _raise(text: str) -> None:
    raise ValueError(text)


def _log(text: str) -> None:
    LOG.debug("a detail of %s", text)
    try:
        _raise(text)
    except ValueError:
        LOG.warning("%s …", text, exc_info=True)


DEEDS: dict[str, Callable[[str], object]] = {
    "answer": lambda _: None,
    "sleep": lambda seconds: time.sleep(float(seconds)),
    "raise": _raise,
    "log": _log,
    "die": _die,
    "die once": _die_once,
}
