"""Keeps the clients' caches of a test in its own folder; federations that many laws are held against run once."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tests.conftest import made_rows
from tests.strategies.federations import Federation, classification, federate, language_model
from tests.strategies.rounds import LONGER, METHODS, ROUNDS, Learning, Options, Plain, looking


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="session")
def options(request: pytest.FixtureRequest, tiny_csv: Path) -> Options:
    """Return the overrides of a federation: a model, a method, and more."""

    def make(model: str = "tiny_bert", method: str = "fed_sb", *more: str) -> list[str]:
        task = classification if model == "tiny_bert" else language_model
        return [
            *METHODS.get(method, [f"method={method}"]),
            *task(request.getfixturevalue(model), tiny_csv),
            *ROUNDS,
            *LONGER.get(method, ()),
            *more,
        ]

    return make


@pytest.fixture(scope="session")
def learning() -> Learning:
    """The parameters that could learn when a client of a :func:`plain` run had trained, by model, method and round."""
    return {}


@pytest.fixture(scope="session")
def plain(options: Options, learning: Learning, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """Run a federation of a model by a method as :func:`options` gives it, once a session."""

    @cache
    def run(model: str, method: str) -> Federation:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FEDSB_HOME", str(tmp_path_factory.mktemp("home")))
            return federate(options(model, method), app=looking(learning, (model, method)))

    return run


@pytest.fixture
def tables(tmp_path: Path) -> dict[int, Path]:
    """Tables by their number of rows."""
    rows, found = made_rows(), {}
    for count in (20, 21, 30):
        found[count] = tmp_path / f"{count}.csv"
        found[count].write_text("\n".join(["text,label", *(f"{text},{label}" for text, label in rows[:count])]) + "\n")
    return found
