"""What ``docs/nginx.conf`` publishes of a SuperLink: nodes get through it, and nobody who would start a run or register a key does."""

from __future__ import annotations

import datetime
import ipaddress
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedsb.runtime.connection import flower_environment, script
from fedsb.runtime.flower import free_port
from fedsb.runtime.processes import ProcessTree
from tests.flower.harness import ROOT, eventually

NGINX = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(500),
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed"),
]


def certify(folder: Path) -> tuple[Path, Path]:
    """Write a certificate for 127.0.0.1, signed by itself, and its key."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate, secret = folder / "federation.pem", folder / "federation.key"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    secret.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    return certificate, secret


@contextmanager
def superlink(folder: Path, certificate: Path, secret: Path) -> Iterator[str]:
    """Run a SuperLink as the documentation says, with TLS and keys of nodes, and yield its address."""
    folder.mkdir()
    port = free_port()
    tls = ["--ssl-ca-certfile", str(certificate), "--ssl-certfile", str(certificate), "--ssl-keyfile", str(secret)]
    command = [script("flower-superlink"), *tls, "--enable-supernode-auth", "--host", "127.0.0.1", "--port", str(port)]
    tree = ProcessTree(command, environment=flower_environment(folder), folder=folder, log=folder / "superlink.log")
    try:
        yield f"127.0.0.1:{port}"
    finally:
        tree.end()


@contextmanager
def proxy(folder: Path, link: str, certificate: Path, secret: Path) -> Iterator[str]:
    """Run nginx with the file of the documentation, its addresses and certificates replaced, and yield its address."""
    folder.mkdir()
    port = free_port()
    server = (ROOT / "docs" / "nginx.conf").read_text(encoding="utf-8")
    replaced = {
        "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
        "https://127.0.0.1:18000;": f"https://{link};",
        "/etc/ssl/federation.pem": str(certificate),
        "/etc/ssl/federation.key": str(secret),
        "/etc/ssl/ca.crt": str(certificate),
    }
    for old, new in replaced.items():
        assert server.count(old) == 1
        server = server.replace(old, new)
    temporary = "".join(f"{kind}_temp_path {folder / kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    main = f"daemon off;\nworker_processes 1;\npid {folder / 'pid'};\nerror_log stderr;\nevents {{}}\n"
    path = folder / "nginx.conf"
    path.write_text(f"{main}http {{\naccess_log {folder / 'access.log'};\n{temporary}{server}\n}}\n", encoding="utf-8")
    tree = ProcessTree([str(NGINX), "-c", str(path)], environment={}, folder=folder, log=folder / "nginx.log")
    try:
        yield f"127.0.0.1:{port}"
    finally:
        tree.end()


def flwr(home: Path, address: str, certificate: Path, *arguments: str) -> int:
    """Run a command over a connection to ``address`` and return its exit status."""
    home.mkdir(exist_ok=True)
    connection = f'[superlink]\ndefault = "there"\n\n[superlink.there]\naddress = "{address}"\nroot-certificates = "{certificate}"\n'
    (home / "config.toml").write_text(connection, encoding="utf-8")
    command = [script("flwr"), *arguments, "there"]
    return subprocess.run(command, env=flower_environment(home), text=True, capture_output=True, check=False).returncode


def requests(log: Path) -> list[tuple[str, int]]:
    """Return path and status of each request in nginx's log."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return [(line.split('"')[1].split()[1], int(line.split('"')[2].split()[0])) for line in lines]


def test_nodes_get_through_and_whoever_would_start_a_run_does_not(app: Path, tmp_path: Path) -> None:
    certificate, secret = certify(tmp_path)
    log, home, key = tmp_path / "nginx" / "access.log", tmp_path / "node", tmp_path / "key"
    home.mkdir()
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(key)], check=True)
    register = ("supernode", "register", f"{key}.pub")
    with (
        superlink(tmp_path / "superlink", certificate, secret) as link,
        proxy(tmp_path / "nginx", link, certificate, secret) as address,
    ):
        assert eventually(lambda: flwr(tmp_path / "inside", link, certificate, *register) == 0, 100, pause=1.0)
        options = ["--root-certificates", str(certificate), "--auth-supernode-private-key", str(key), "--port", str(free_port())]
        command = [script("flower-supernode"), "--superlink", address, *options]
        node = ProcessTree(command, environment=flower_environment(home), folder=home, log=home / "supernode.log")
        try:
            assert eventually(lambda: ("/v1/fleet/pull-messages", 200) in requests(log), 100), (home / "supernode.log").read_text()
        finally:
            node.end()
        for arguments in (("run", str(app)), register):
            assert flwr(tmp_path / "outside", address, certificate, *arguments) != 0
    others = {(path, status) for path, status in requests(log) if not path.startswith("/v1/fleet/")}
    assert others >= {("/v1/control/start-run", 404), ("/v1/control/register-node", 404)}
    assert {status for _, status in others} == {404}
    assert {status for path, status in requests(log) if path.startswith("/v1/fleet/")} == {200}
