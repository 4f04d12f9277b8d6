"""What each side says where it can't begin, is asked what runs, or is ended: one line, before anything is started."""

from __future__ import annotations

import datetime
import http.server
import os
import shutil
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import format_datetime
from pathlib import Path

import pytest

from fedsb.cli import main
from fedsb.core.errors import UserError
from fedsb.federation.certificates import certify, node_key
from fedsb.federation.held import held, running, stop
from fedsb.federation.reach import check_reach, split
from fedsb.runtime.connection import FlowerError
from fedsb.runtime.flower import free_port
from tests.flower.harness import ROOT, eventually


class Plain(http.server.HTTPServer):
    """One that looks up no name when it is made."""

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "here", int(self.server_address[1])


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[Callable[[float], str]]:
    """A server over TLS, with a certificate for this machine, whose clock differs by some seconds."""
    certify(tmp_path / "server", [])
    servers: list[Plain] = []

    def start(ahead: float) -> str:
        class Clock(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()

            def date_time_string(self, timestamp: float | None = None) -> str:
                return format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=ahead), usegmt=True)

            def log_message(self, format: str, *arguments: object) -> None:
                """Say nothing."""

        server = Plain(("0.0.0.0", 0), Clock)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "server" / "link.crt", tmp_path / "server" / "link.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("ahead", "said"), [(0, ""), (200, ""), (-3, ""), (330, "330 s behind that of"), (-30, "30 s ahead of that of")])
def test_a_clock_that_is_off_is_told_with_the_seconds(ahead: float, said: str, answering: Callable[[float], str], tmp_path: Path) -> None:
    """Flower takes a key's signature up to 305 s after its time and 5 s before; ``ahead`` is the server's clock."""
    address = answering(ahead)
    if not said:
        check_reach(address, tmp_path / "server" / "ca.crt")
        return
    seconds, way = said.split(" s ")
    with pytest.raises(
        FlowerError, match=rf"this machine's clock is ({seconds}|{int(seconds) - 1}|{int(seconds) + 1}) s {way} {address}, and"
    ):
        check_reach(address, tmp_path / "server" / "ca.crt")


def test_an_authority_that_is_not_the_servers_and_a_name_that_is_not_on_its_certificate(answering, tmp_path: Path) -> None:
    address = answering(0)
    certify(tmp_path / "another", [])
    with pytest.raises(UserError, match=r"is not of the authority in '.*another/ca.crt'; take ca.crt from whoever runs the SuperLink"):
        check_reach(address, tmp_path / "another" / "ca.crt")
    other = address.replace("127.0.0.1", "127.0.0.2")
    with pytest.raises(UserError, match=r"is for other names; 'fedsb federation init FOLDER --host 127.0.0.2'"):
        check_reach(other, tmp_path / "server" / "ca.crt")
    (tmp_path / "none.crt").write_text("none")
    with pytest.raises(UserError, match=r"holds no certificate"):
        check_reach(address, tmp_path / "none.crt")
    with pytest.raises(FlowerError, match=rf"no SuperLink answers at 127.0.0.1:{(port := free_port())}: Connection refused"):
        check_reach(f"127.0.0.1:{port}", tmp_path / "server" / "ca.crt")


def test_a_port_without_tls_is_told(tmp_path: Path) -> None:
    certify(tmp_path, [])
    server = Plain(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.handle_request, daemon=True).start()
    with pytest.raises(UserError, match=r"speaks no TLS"):
        check_reach(f"127.0.0.1:{server.server_port}", tmp_path / "ca.crt")
    server.server_close()


@pytest.mark.parametrize("address", ["host", ":1", "host:", "host:x", "host:0", "host:65536"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UserError, match=r"is no address; give HOST:PORT"):
        split(address)


def test_an_address_of_the_sixth_version() -> None:
    assert split("[::1]:443") == ("::1", 443)


def test_one_process_runs_from_a_folder_and_is_ended_by_its_id(tmp_path: Path) -> None:
    program = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; from fedsb.federation.held import held\n"
    program += f"with held(Path({str(tmp_path)!r})): time.sleep(60)"
    with pytest.raises(UserError, match=r"nothing runs from"):
        stop(tmp_path)
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        assert eventually(lambda: running(tmp_path) is not None)
        with pytest.raises(UserError, match=rf"process {process.pid} runs from '.*' already; 'fedsb federation stop"), held(tmp_path):
            pass
        begun = time.monotonic()
        assert stop(tmp_path) == process.pid  # it is a zombie until its parent asks
        assert time.monotonic() - begun < 30
    assert running(tmp_path) is None


def test_what_stands_in_the_file_counts_while_it_is_held(tmp_path: Path) -> None:
    (tmp_path / "pid").write_text("1")  # of one that was killed; another has its id now
    assert running(tmp_path) is None
    with held(tmp_path):
        found = running(tmp_path)
        assert found is not None
        assert found.pid == os.getpid()
    assert running(tmp_path) is None


def ended(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit_:
        main(["federation", *arguments])
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return int(exit_.value.code or 0), captured.err


MISTAKES = {
    "a server without certificates": (["server", "{}/empty"], "ca.crt' is not there; 'fedsb federation init"),
    "a node without a key": (["node", "{}/empty", "--link", "a:1"], "empty/key' is not there; 'fedsb federation node-key"),
    "a node without an authority": (["node", "{}/keyed", "--link", "a:1"], "ca.crt' is not there; take it from whoever runs the SuperLink"),
    "a node without its file": (["node", "{}/trusting", "--link", "a:1"], "node.yaml' is not there; docs/node.yaml has every key of it"),
    "a node without an address": (["node", "{}/trusting"], "needs the SuperLink's address: --link"),
    "a user without a worker": (["node", "{}/trusting", "--link", "a:1", "--worker-user", "x"], "name its folder by --worker"),
    "a port that is none": (["server", "{}/server", "--port", "x"], "'127.0.0.1:x' is no address"),
    "the status of no side": (["status", "{}/empty"], "is neither a server's folder"),
    "an end of nothing": (["stop", "{}/empty"], "nothing runs from"),
    "an unknown thing": (["serve", "x"], "unknown fedsb federation 'serve' (did you mean 'server'?); choose from"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, line = MISTAKES[name]
    certify(tmp_path / "server", [])
    (tmp_path / "empty").mkdir()
    for folder in ("keyed", "trusting"):
        node_key(tmp_path / folder / "key")
    shutil.copyfile(tmp_path / "server" / "ca.crt", tmp_path / "trusting" / "ca.crt")
    status, said = ended([each.format(tmp_path) for each in arguments], capsys)
    assert (status, line in said) == (2, True), said


def test_status_of_what_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    certify(tmp_path, [])
    with pytest.raises(SystemExit):
        main(["federation", "status", str(tmp_path)])
    assert capsys.readouterr().out == "server: does not run\n"
