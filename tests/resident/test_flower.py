"""Another Flower at a node than at the server: told at both, before anything else is asked."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedsb.client_app import Answering
from fedsb.privacy.codes import CODES
from fedsb.resident.flower import unlike
from strategies.asking import Questions


def question(**told: str) -> Message:
    return Message(RecordDict({"config": ConfigRecord(dict(told))}), 1, "query.describe")


def installed(folder: Path, release: str) -> Path:
    """Lay out what pip leaves of a release of Flower, for whoever asks for its version."""
    (folder / f"flwr-{release}.dist-info").mkdir(parents=True)
    (folder / f"flwr-{release}.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flwr\nVersion: {release}\n")
    return folder


@pytest.fixture
def asked() -> Message:
    """The question of a server with the Flower that is installed here."""
    return question(**Questions([], 1.0)._told)


@pytest.mark.parametrize("worker", [{}, {"worker": "/run/none"}])
def test_another_minor_release_is_told_to_the_server_by_a_code_and_to_the_operator_with_both_versions(
    asked: Message, worker: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    here = version("flwr")
    monkeypatch.syspath_prepend(str(installed(tmp_path / "site", "1.7.3")))
    context = Context(1, 2, {"client": "a", **worker}, RecordDict(), {})
    reply = Answering()(asked, context)
    assert dict(reply.content.metric_records["metrics"]) == {"code": CODES["flower"].number}
    log = (tmp_path / "home" / "node.log").read_text()
    assert f"no reply to 'query.describe': the server's Flower is {here}, and this node's 1.7.3: install one" in log


def test_patch_releases_go_together_and_a_server_that_tells_none_is_not_asked(
    asked: Message, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    major, minor = version("flwr").split(".")[:2]
    monkeypatch.syspath_prepend(str(installed(tmp_path, f"{major}.{minor}.99")))
    assert version("flwr") == f"{major}.{minor}.99"
    assert unlike(asked) == unlike(question()) == ""
    assert unlike(question(flwr=f"{major}.{int(minor) + 1}.0"))
