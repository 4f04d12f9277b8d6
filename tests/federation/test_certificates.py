"""Certificates and keys hold what they are for: a handshake by Python's own TLS, and Flower's own reading of a node's key."""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedsb.cli import main
from fedsb.core.errors import UserError
from fedsb.federation.certificates import certify, node_key
from tests.flower.harness import ROOT


def shakes(folder: Path, name: str, authority: Path | None = None, flags: int = 0) -> bool:
    """Tell whether a client that trusts an authority takes the server for ``name``."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=str(authority or folder / "ca.crt"))
    client.verify_flags |= flags
    server.load_cert_chain(folder / "link.crt", folder / "link.key")
    here, there = socket.socketpair()

    def serve() -> None:
        with suppress(OSError, ssl.SSLError), server.wrap_socket(there, server_side=True):
            pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(here, server_hostname=name):
            return True
    except ssl.SSLCertVerificationError:
        return False
    finally:
        here.close()
        thread.join(10)
        there.close()


def test_a_client_takes_the_server_for_its_names_and_no_others(tmp_path: Path) -> None:
    certify(tmp_path / "a", ["federation.example.org", "10.0.0.7"])
    assert all(shakes(tmp_path / "a", name) for name in ("federation.example.org", "10.0.0.7", "127.0.0.1", "localhost"))
    assert not shakes(tmp_path / "a", "example.org")
    certify(tmp_path / "b", ["federation.example.org"])
    assert not shakes(tmp_path / "a", "federation.example.org", tmp_path / "b" / "ca.crt")


def test_a_certificate_is_renewed_under_the_same_authority_and_key(tmp_path: Path) -> None:
    certify(tmp_path, ["old.example.org"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    certify(tmp_path, ["new.example.org"])
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"link.crt"}
    assert shakes(tmp_path, "new.example.org")
    assert not shakes(tmp_path, "old.example.org")
    assert {path.name for path in tmp_path.iterdir() if not path.stat().st_mode & 0o077} == {"ca.key", "link.key"}


def test_nginx_as_documented_takes_the_certificate(tmp_path: Path) -> None:
    """It looks for the name that its configuration says, among names and not addresses."""
    certify(tmp_path, ["federation.example.org"])
    [name] = re.findall(r"^\s+proxy_ssl_name (\S+);$", (ROOT / "docs" / "nginx.conf").read_text(encoding="utf-8"), re.MULTILINE)
    assert shakes(tmp_path, name)
    extensions = x509.load_pem_x509_certificate((tmp_path / "link.crt").read_bytes()).extensions
    found = extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert name in found.value.get_values_for_type(x509.DNSName)


def test_certificates_say_whose_they_are_as_strict_readers_ask(tmp_path: Path) -> None:
    """Python 3.13 asks by default."""
    certify(tmp_path, [])
    own, above = (x509.load_pem_x509_certificate((tmp_path / f"{name}.crt").read_bytes()).extensions for name in ("link", "ca"))
    said = own.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    assert said == above.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    assert shakes(tmp_path, "localhost", flags=ssl.VERIFY_X509_STRICT)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [("ca.key", "none", "can't be read as a key"), ("ca.crt", "none", "holds no certificate"), ("ca.key", None, "is not of the key")],
)
def test_a_damaged_authority_is_told(name: str, content: str | None, line: str, tmp_path: Path) -> None:
    certify(tmp_path / "one", [])
    certify(tmp_path / "other", [])
    damaged = (tmp_path / "other" / name).read_text() if content is None else content
    (tmp_path / "one" / name).write_text(damaged)
    with pytest.raises(UserError, match=line):
        certify(tmp_path / "one", [])


def test_the_key_of_a_node_is_what_flower_and_ssh_read(tmp_path: Path) -> None:
    public = node_key(tmp_path / "of a node" / "node")
    private = load_ssh_private_key((tmp_path / "of a node" / "node").read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert not (tmp_path / "of a node" / "node").stat().st_mode & 0o077
    assert private.curve.key_size == 384
    found = load_ssh_public_key(public.read_bytes())
    assert isinstance(found, ec.EllipticCurvePublicKey)
    assert found.public_numbers() == private.public_key().public_numbers()
    shown = subprocess.run(["ssh-keygen", "-y", "-f", tmp_path / "of a node" / "node"], capture_output=True, text=True, check=True)
    assert shown.stdout.split()[:2] == public.read_text().split()[:2]


MISTAKES: dict[str, tuple[list[str], str]] = {
    "nothing to do": ([], "unknown fedsb federation ''; choose from init, node, node-key, server, status, stop"),
    "another thing": (["inti", "x"], "unknown fedsb federation 'inti' (did you mean 'init'?)"),
    "no path": (["init"], "fedsb federation init takes one path"),
    "no host": (["init", "{folder}/a", "--host", "a b"], "--host 'a b' is neither an address nor a name"),
    "a host of dashes": (["init", "{folder}/a", "--host", "-a.org"], "--host '-a.org' is neither"),
    "a flag of the other": (["node-key", "{folder}/n", "--host", "a"], "fedsb federation node-key has no flag '--host'"),
    "a key that is there": (["node-key", "{folder}/taken"], "is there already, and a node's key is made once"),
    "half an authority": (["init", "{folder}"], "ca.crt' is missing beside its other half"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line_and_nothing_is_lost(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, line = MISTAKES[case]
    (tmp_path / "taken").write_text("a key")
    (tmp_path / "ca.key").write_text("another")
    with pytest.raises(SystemExit) as ended:
        main(["federation", *(text.format(folder=tmp_path) for text in given)])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert line in said
    assert len(said.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ca.key", "taken"]
    assert (tmp_path / "taken").read_text() == "a key"


def test_commands_say_what_was_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, words in (
        (["init", str(tmp_path / "f"), "--host", "a.org,10.0.0.7"], "fedsb federation server"),
        (["node-key", str(tmp_path / "n")], "send n.pub to whoever runs the SuperLink"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["federation", *given])
        assert ended.value.code == 0
        said = capsys.readouterr().out
        assert words in said
        assert all(Path(line).is_file() for line in said.splitlines() if line.startswith("/"))


def test_a_key_that_others_can_get_at_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    certify(tmp_path, [])
    (tmp_path / "ca.key").chmod(0o644)
    with pytest.raises(SystemExit):
        main(["federation", "init", str(tmp_path)])
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("caution")]
    assert told == [f"caution: '{tmp_path}/ca.key' is open to others than its user (mode 0644): chmod 600 '{tmp_path}/ca.key'"]


def test_no_name_is_as_many_as_are_here(tmp_path: Path) -> None:
    certify(tmp_path, [])
    assert shakes(tmp_path, "localhost")
    with pytest.raises(UserError):
        certify(tmp_path, ["x" * 64 + ".org"])
