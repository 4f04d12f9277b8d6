"""In the process of a Ray actor: a ClientApp, and base models mapped from the object store."""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsb.core.collector import uncollected

with uncollected(for_good=True):
    import ray
    from flwr.app import ArrayRecord, Message, RecordDict
    from torch import nn

    from fedsb.core.logs import Line, overheard
    from fedsb.core.networks import use_networks
    from fedsb.runtime.grid import answered, claim_identity, context_of
    from fedsb.runtime.sharing import join, share_arrays


@dataclass(frozen=True)
class Work:
    """A message as it goes to an actor: what many share lies in the object store, by reference.

    Attributes:
        message: with the content that is its own.
        shared: further records of the content, by key; empty for the one that the actor has got last.
        networks: base models in the object store, by key; None for those that the actor has been told.
    """

    message: Message
    shared: Mapping[str, Sequence[ray.ObjectRef]]
    node_config: dict[str, Any]
    run_config: dict[str, Any]
    networks: Mapping[str, list[ray.ObjectRef]] | None
    environment: Mapping[str, str]


class Worker:
    """In the actor's process: a ClientApp, and base models mapped from the object store."""

    def __init__(self, client: str, together: str, cards: bool = True) -> None:
        if not cards:
            # Ray leaves all of them visible to an actor that reserves none.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        claim_identity()
        share_arrays()
        self._client = pkgutil.resolve_name(client)
        self._together = together
        self._networks: Mapping[str, list[ray.ObjectRef]] = {}
        self._shared: dict[str, ArrayRecord] = {}
        use_networks(self._network)

    def answer(self, works: Sequence[Work], level: int) -> tuple[list[Message], list[Line]]:
        """Answer one message, or several at once, and return what was logged over it from a level on."""
        with overheard(level) as lines:
            return self._answer(works), lines

    def _answer(self, works: Sequence[Work]) -> list[Message]:
        messages = [self._unpacked(work) for work in works]
        contexts = [context_of(m.metadata.dst_node_id, work.node_config, work.run_config) for m, work in zip(messages, works, strict=True)]
        if len(works) > 1:
            replies: list[Message] = pkgutil.resolve_name(self._together)(messages, contexts)
            return replies
        return [answered(self._client, message, context) for message, context in zip(messages, contexts, strict=True)]

    def _unpacked(self, work: Work) -> Message:
        self._networks = self._networks if work.networks is None else work.networks
        os.environ.update(work.environment)
        records = {key: self._record(key, refs) for key, refs in work.shared.items()}
        return with_content(work.message, RecordDict({**records, **work.message.content}))

    def _record(self, key: str, refs: Sequence[ray.ObjectRef]) -> ArrayRecord:
        """Fetch a record, or take the last one."""
        if refs:
            self._shared[key] = ray.get(refs[0])
        return self._shared[key]

    def call(self, function: Callable[..., Any], *arguments: Any, networks: Mapping[str, list[ray.ObjectRef]] | None = None) -> Any:
        """Run a function in the actor's process, with these base models at hand; for measurements."""
        self._networks = networks or self._networks
        return function(*arguments)

    def _network(self, key: str, load: Callable[[], nn.Module]) -> nn.Module:
        return join(ray.get(self._networks[key][0])) if key in self._networks else load()


def with_content(message: Message, content: RecordDict) -> Message:
    """Return a message with other content, and the id that the first one has."""
    return Message(content=content, metadata=message.metadata)  # type: ignore[call-overload, no-any-return]
