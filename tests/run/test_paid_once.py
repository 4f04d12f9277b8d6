"""A private run that goes on over real nodes under another of Flower's run ids: no node is charged again for what it has answered.

And a server that says it goes on with a run, and asks for something else, gets nothing that is not charged.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from shlex import join
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedsb import client_app
from fedsb.config.compose import load
from fedsb.core.disk import locked
from fedsb.core.errors import RunError
from fedsb.core.folders import home
from fedsb.privacy.account import TURNS
from fedsb.privacy.codes import CODES
from fedsb.run.resuming import resumed
from fedsb.server_app import serve
from fedsb.wire.messages import decode_reply
from tests.run.mortal import Killed, Mortal
from tests.strategies.privacy.test_node_files import node_file
from tests.strategies.private_runs import EXAMPLE, small

TWO = ("federation.num_clients=2", "federation.names=[a,b]", *EXAMPLE)
STARTED = ("init.kind=gradient", "init.power_iterations=2", "privacy.init_fraction=0.2", "init.num_examples=8")
EVALUATED = ("federation.evaluate_clients=true", "privacy.eval_fraction=0.2", "data.client_test_fraction=0.2")
RUN = (*TWO, *STARTED, *EVALUATED)
START = 2 * 6  # replies to the exchanges of the start
EVERY_RELEASE = sorted(
    [(0, f"evidence-{number}", client) for number in range(6) for client in "ab"]
    + [(number, exchange, client) for number in (1, 2) for exchange in ("train", "evaluate") for client in "ab"]
)


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))


class Noting:
    """The ClientApp in one of Flower's runs, with what it was asked and what it said, in order."""

    def __init__(self, flower: int) -> None:
        self._flower = flower
        self.seen: list[tuple[Message, Context, Message]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        there = Context(self._flower, context.node_id, context.node_config, context.state, context.run_config)
        reply = client_app.app(message, there)
        self.seen.append((message, there, reply))
        return reply

    def uploads(self) -> dict[tuple[Any, ...], list[bytes]]:
        """Return the uploads by what was asked."""
        found = {}
        for message, _, reply in self.seen:
            told, kind = message.content.config_records["config"], message.metadata.message_type
            if not kind.startswith("query"):
                found[kind, told["client"], told["round"], told["stage"]] = data_of(reply)
        return found


def data_of(reply: Message) -> list[bytes]:
    return [array.data for array in reply.content.array_records["arrays"].values()]


def on_nodes(
    folder: Path, bert: Path, work: Path, *given: str, app: Noting, life: int = 10**9, after: bool = True, **said: Any
) -> dict[str, Any]:
    """Run on two nodes, whose operators say what is ``said``."""
    overrides = [*given] if "resume=" in str(given) else small(bert, work, *given)
    seen = [each if not each.startswith("resume=") else f"resume={work / 'nowhere'}" for each in overrides]
    nodes = {number: node_file(work, client, **said) for number, client in enumerate("ab", start=1)}
    grid = Mortal(app, {"overrides": join(seen)}, nodes)
    grid.life, grid.after = life, after
    return serve(resumed(load(overrides), overrides), grid, folder, overrides=overrides)


@pytest.mark.parametrize("said", ["", "no number\n", "\xff\n"])
def test_a_number_that_is_damaged_is_that_of_the_last_checkpoint(said: str, tiny_bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        on_nodes(folder, tiny_bert, tmp_path, *TWO, app=Noting(1), life=2 + 3)
    known = (folder / "identity").read_text()
    (folder / "identity").write_text(said, encoding="latin-1")
    on_nodes(folder, tiny_bert, tmp_path, f"resume={folder}", app=Noting(2))
    assert (folder / "identity").read_text() == known
    assert charged() == sorted((number, "train", client) for number in (1, 2) for client in "ab")


def lines() -> list[dict[str, Any]]:
    ledgers = sorted(home().glob("ledgers/*/ledger.jsonl"))
    return [json.loads(line) for path in ledgers for line in path.read_text(encoding="utf-8").splitlines()[1:]]


def charged() -> list[tuple[Any, ...]]:
    """Return round, exchange and client of all that was charged."""
    return sorted(tuple(line["key"][1:]) for line in lines())


@pytest.mark.parametrize("life", [2 + 11, 2 + START + 3, 2 + START + 7], ids=["in the start", "in round 1's metrics", "in the last round"])
def test_a_run_that_goes_on_is_charged_once_for_each_release(life: int, tiny_bert: Path, tmp_path: Path) -> None:
    folder, first, second = tmp_path / "run", Noting(1), Noting(2)
    with pytest.raises(Killed):
        on_nodes(folder, tiny_bert, tmp_path, *RUN, app=first, life=life)
    assert on_nodes(folder, tiny_bert, tmp_path, f"resume={folder}", app=second)["failures"] == 0
    assert charged() == EVERY_RELEASE
    before, after = first.uploads(), second.uploads()
    assert before.keys() & after.keys()
    assert {asked: after[asked] for asked in before.keys() & after} == {asked: before[asked] for asked in before.keys() & after}


def test_a_run_that_goes_on_has_the_budget_that_was_left(tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not a fresh one: what it has released in two rounds and would in a third is too much, whoever asks."""
    folder, rounds = tmp_path / "run", (*TWO, "federation.num_rounds=3")
    with pytest.raises(Killed):
        on_nodes(folder, tiny_bert, tmp_path, *rounds, app=Noting(1), life=2 + 4, after=False)
    spent = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["epsilon"]["max"]
    own = {"unit": "example", "max_epsilon_run": spent * 1.1}
    with pytest.raises(RunError, match=re.escape(CODES["budget"].text)):
        on_nodes(folder, tiny_bert, tmp_path, f"resume={folder}", app=Noting(2), privacy=own)
    assert "the node's max_epsilon_run=" in caplog.text
    assert charged() == sorted((number, "train", client) for number in (1, 2) for client in "ab")


class Liar:
    """A server that has the messages of a run, and sends them again as it likes."""

    def __init__(self, app: Noting, kind: str = "train") -> None:
        self._kind = kind
        self._message, self._context, reply = next(each for each in app.seen if each[0].metadata.message_type == kind)
        self.upload = data_of(reply)

    def ask(self, flower: int, *, scaled: float = 1.0, **told: Any) -> Message:
        """Send the run's first message of a kind again, with another state, or with something else told."""
        content = self._message.content
        arrays = {name: type(array)(array.numpy() * array.numpy().dtype.type(scaled)) for name, array in content["arrays"].items()}
        config = {**content.config_records["config"], **told}
        message = Message(RecordDict({"arrays": ArrayRecord(arrays), "config": ConfigRecord(config)}), 1, self._kind)  # type: ignore[arg-type]
        message.metadata.__dict__["_message_id"] = "asked"
        old = self._context
        return client_app.app(message, Context(flower, old.node_id, old.node_config, old.state, old.run_config))


@pytest.fixture
def liar(tiny_bert: Path, tmp_path: Path) -> Liar:
    app = Noting(1)
    on_nodes(tmp_path / "run", tiny_bert, tmp_path, *TWO, app=app)
    assert charged() == sorted((number, "train", client) for number in (1, 2) for client in "ab")
    return Liar(app)


def test_who_says_that_it_is_a_run_gets_of_it_what_that_got_and_pays_for_all_else(liar: Liar) -> None:
    before = len(lines())
    assert data_of(liar.ask(77)) == liar.upload
    assert len(lines()) == before
    for count, more in enumerate(({"scaled": 2.0}, {"origin": "ab" * 16}, {"own": 1}), start=1):
        reply = liar.ask(77, **more)
        assert decode_reply(reply.content).code == 0
        assert data_of(reply) != liar.upload
        assert len(lines()) == before + count
    assert decode_reply(liar.ask(77, round=9, origin="cd" * 16).content).code == CODES["refused"].number
    assert len(lines()) == before + count


def test_frozen_parts_of_a_run_without_a_name_are_not_taken_for_what_their_heads_say(liar: Liar) -> None:
    assert decode_reply(liar.ask(78, origin="no name of a run").content).code == 0
    assert len({path.name.partition("-run-")[2] for path in home().glob("frozen/*.safetensors")} - {""}) == 2


NAMES: dict[str, Sequence[tuple[int, str]]] = {
    "one run of Flower's by many names": [(5, f"{number:032x}") for number in range(40)],
    "one name in many runs of Flower's": [(number, "ab" * 16) for number in range(5, 45)],
    "names and runs in turns": [(5 + number // 2, f"{(number + 1) // 2:032x}") for number in range(40)],
}


@pytest.mark.parametrize("how", NAMES)
def test_no_name_gives_a_run_a_fresh_budget(how: str, liar: Liar, tmp_path: Path) -> None:
    node_file(tmp_path, "a", privacy={"unit": "example", "max_epsilon_run": 6.0})
    codes = []
    for flower, name in NAMES[how]:
        codes.append(decode_reply(liar.ask(flower, scaled=1.0 + len(codes), origin=name).content).code)
        if codes[-1]:
            break
    assert codes[-1] == CODES["budget"].number
    assert 1 < len(codes) < 20
    assert decode_reply(liar.ask(99, origin="ff" * 16).content).code == 0  # another run, within that of the ledger's life


def test_over_its_life_a_ledger_is_one_whatever_runs_are_called(liar: Liar, tmp_path: Path) -> None:
    node_file(tmp_path, "a", privacy={"unit": "example", "max_epsilon": 6.0})
    codes = [decode_reply(liar.ask(100 + number, origin=f"{number:032x}").content).code for number in range(12)]
    assert codes[0] == 0
    assert codes[-1] == CODES["budget"].number


@pytest.fixture(scope="module")
def measured(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Noting, Path]:
    """A run with messages of every kind that is charged, and where its nodes live."""
    app, work = Noting(1), tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSB_HOME", str(work / "home"))
        on_nodes(work / "run", tiny_bert, work, *RUN, "federation.num_rounds=1", app=app)
    return app, work / "home"


@pytest.mark.parametrize("kind", ["train", "train.evidence", "evaluate"])
def test_who_asks_while_another_process_is_at_work_waits(kind: str, measured: tuple[Noting, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed and goes on at once asks again before the node is done with what it was asked: it would be charged for both."""
    app, homes = measured
    monkeypatch.setenv("FEDSB_HOME", str(homes))
    liar, before = Liar(app, kind), len(lines())
    with ThreadPoolExecutor(1) as threads:
        with ExitStack() as at_work:
            for ledger in home().glob("ledgers/*/ledger.jsonl"):
                for number in range(TURNS):
                    at_work.enter_context(locked(ledger.with_name(f"turn-{number}")))
            asked = threads.submit(liar.ask, 2, own=7)
            time.sleep(0.5)
            assert not asked.done()
            assert len(lines()) == before
        assert decode_reply(asked.result(60).content).code == 0
    assert len(lines()) == before + 1
