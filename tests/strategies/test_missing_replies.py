"""A round goes on without the clients that fail, fall silent or keep nothing, and stops where too few are left."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Context, Message

from fedsb.client_app import app as client_app
from fedsb.core.errors import RunError
from fedsb.wire.messages import decode_instruction, encode_missing
from strategies import transport
from tests.strategies.federations import ClientCall, KeepingGrid, federate, mean_update, next_instructions
from tests.strategies.rounds import Options, minus, plus, pristine, relative


def test_a_client_that_can_keep_nothing_is_not_asked_for_ever(options: Options) -> None:
    def call(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and decode_instruction(message.content).client == "client-1":
            return Message(encode_missing(), reply_to=message)
        return client_app(message, context)

    federation = federate(options("tiny_bert", "fed_sb", "federation.fraction=1.0", "federation.num_rounds=1"), app=call)
    assert federation.records[1].failed == {"client-1": "lacks frozen state although it was sent all of it"}
    assert [e.instruction.client for e in federation.grid.rounds()[1]].count("client-1") == 2


def raising(number: int, *clients: str) -> ClientCall:
    """Return the ClientApp with some clients that fail in one round."""

    def call(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            instruction = decode_instruction(message.content)
            if instruction.round == number and instruction.client in clients:
                raise OSError("no space left on the device of this client")
        return client_app(message, context)

    return call


def test_the_round_goes_on_without_a_client_that_raises(options: Options, tmp_path: Path) -> None:
    """The mean is over those who answered, and their weights sum to one."""
    overrides = options("tiny_bert", "fedex_lora", "federation.fraction=1.0", "federation.num_rounds=2")
    federation = federate(overrides, app=raising(1, "client-0", "client-3"))
    failed = federation.records[1].failed
    assert set(failed) == {"client-0", "client-3"}
    assert all("no space left on the device of this client" in reason for reason in failed.values())
    exchanges, during, after = next(next_instructions(federation, tmp_path))
    update, _ = mean_update(federation, exchanges, during.basis.merge(during.state))
    wanted = plus(pristine(federation), update)
    assert all(relative(minus(held.weights, wanted), wanted) <= 1e-6 for held in after)


def test_too_few_replies_stop_the_run(options: Options) -> None:
    overrides = options("tiny_bert", "fed_sb", "federation.fraction=1.0", "federation.min_replies=4")
    with pytest.raises(RunError, match=r"round 2: 3 valid replies, federation\.min_replies=4 \(client-0: .*no space left"):
        federate(overrides, app=raising(2, "client-0", "client-3"))


def test_a_client_that_never_answers_is_named(options: Options) -> None:
    class DeafGrid(KeepingGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            deaf = [i for i in message_ids if self._deaf(self._pushed[i])]
            return super().pull_messages(set(message_ids) - set(deaf))

        def _deaf(self, message: Message) -> bool:
            return message.metadata.message_type == "train" and decode_instruction(message.content).client == "client-2"

    overrides = options("tiny_bert", "fed_sb", "federation.fraction=1.0", "federation.num_rounds=1", "train.local_steps=1")
    federation = federate(overrides, grid=lambda app, c: DeafGrid(app, c, {1: {"partition-id": 0, "num-partitions": 1}}), timeout=2.0)
    assert federation.records[1].failed == {"client-2": "no reply in time"}


def test_no_client_at_all_stops_the_run(options: Options) -> None:
    with pytest.raises(RunError, match=r"only 0 of 5 clients are connected, 1 are needed; missing: client-0, .*not connected"):
        federate(options("tiny_bert"), grid=lambda app, config: KeepingGrid(app, config, {}))


class Failing(KeepingGrid):
    """A SuperLink that fails over questions for replies: every second one, or from a number on all."""

    status, fatal = 500, 10**9
    asked = 0

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.asked += 1
        if self.asked % 2 or self.asked > self.fatal:
            error = RuntimeError(f"Server error '{self.status}'")
            error.response = SimpleNamespace(status_code=self.status)  # type: ignore[attr-defined]
            raise error
        return super().pull_messages(message_ids)


def over(kind: type[Failing]) -> Callable[[ClientCall, dict[str, Any]], KeepingGrid]:
    return lambda app, run_config: kind(app, run_config, {1: {"partition-id": 0, "num-partitions": 1}})


def test_a_superlink_that_fails_over_a_question_is_asked_again(options: Options) -> None:
    overrides = options("tiny_bert", "fed_sb", "federation.num_rounds=1")
    assert federate(overrides, grid=over(Failing)).sha256 == federate(overrides).sha256


@pytest.mark.parametrize("what", [{"status": 404}, {"fatal": 1}])
def test_one_that_refuses_or_goes_on_failing_stops_the_run(what: dict[str, int], options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MOST_FAILURES", 3)
    monkeypatch.setattr(transport, "POLL_S", (0.001, 0.001))
    with pytest.raises(RuntimeError, match="Server error"):
        federate(options("tiny_bert", "fed_sb", "federation.num_rounds=1"), grid=over(type("Broken", (Failing,), what)))
