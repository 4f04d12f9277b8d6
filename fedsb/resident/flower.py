"""Flower on both sides: a node's and the server's must be of one minor release, as Flower's own servers ask where they look."""

from __future__ import annotations

from importlib.metadata import version

from flwr.app import ConfigRecord, Message

FLOWER = "flwr"  # in the question that a node is asked first, and as it is called among installed packages


def flower_version() -> str:
    """Return the version of Flower that is installed here."""
    return version(FLOWER)


def unlike(message: Message) -> str:
    """Say how the server's Flower, where the message tells its version, differs from this node's; nothing where they go together."""
    theirs, ours = str((message.content.config_records.get("config") or ConfigRecord()).get(FLOWER, "")), flower_version()
    if not theirs or theirs.split(".")[:2] == ours.split(".")[:2]:
        return ""
    return f"the server's Flower is {theirs:.20}, and this node's {ours}: install one minor release on both sides"
