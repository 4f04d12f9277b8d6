"""Run a real federation on one machine: an authority, a SuperLink over TLS, three nodes with keys and workers, and one run on them.

Usage: python scripts/demo_federation.py [Hydra overrides …]. Shows every command that it gives, stops all that it has started, and exits as
the run does. Folders lie in a temporary one, or below $DEMO_FOLDER, where they stay.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from fedsb.core.signals import heeding_sigterm
from fedsb.core.streams import spell_out
from fedsb.runtime.flower import free_port, tail

ROOT = Path(__file__).resolve().parents[1]
CLIENTS = 3
FEDSB = [sys.executable, "-P", "-m", "fedsb.cli"]
FAILED, INTERRUPTED = 1, 130
READY_S, LAST_S, LOOK_S = 180.0, 30.0, 0.2
DEFAULTS = (f"federation.num_clients={CLIENTS}", "federation.num_rounds=2")


class DemoError(RuntimeError):
    """A step of the demo failed; what it printed stands above."""


def main(overrides: Sequence[str]) -> int:
    """Run, and return the exit status; whatever happens, say what is left running."""
    spell_out()
    if {"-h", "--help"} & {*overrides}:
        print((__doc__ or "").strip())
        return os.EX_OK
    kept = os.environ.get("DEMO_FOLDER")
    with heeding_sigterm(), tempfile.TemporaryDirectory(prefix="fedsb-") as scratch:
        folder = Path(kept or scratch).absolute()
        status = tried(folder, overrides)
        left = left_running(folder)
    print(f"left running: {', '.join(left)}" if left else "all is stopped; nothing is left running", flush=True)
    return FAILED if left and not status else status


def tried(folder: Path, overrides: Sequence[str]) -> int:
    """Run the federation; an error or a signal becomes a line and an exit status."""
    try:
        return federation(folder, overrides)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return FAILED


def federation(folder: Path, overrides: Sequence[str]) -> int:
    """Set a federation up in a folder, run one run on it, and stop it; return the run's exit status."""
    data, server = folder / "data", folder / "server"
    dealt = ["scripts/split_data.py", str(data), *DEFAULTS, *overrides]
    do([sys.executable, str(ROOT / dealt[0]), *dealt[1:]], shown=shlex.join(["python", *dealt]))
    fedsb("federation", "init", str(server), quiet=True)
    names = sorted(path.name for path in data.iterdir() if path.is_dir() and path.name != "server")
    for name in names:
        set_up(folder / name, name, data / name, server)
    port = free_port()
    with ExitStack() as stack:
        stack.enter_context(side(server, "SuperLink at", "server", str(server), "--port", str(port)))
        for name in names:
            stack.enter_context(side(folder / name, "takes part at", "node", str(folder / name), "--link", f"127.0.0.1:{port}"))
        own = [override for override in overrides if not override.startswith("data.path=")]
        test = f"data.test_path='{data / 'server' / 'test.jsonl'}'"
        status = fedsb("submit", str(server), "data=files", test, f"output='{folder / 'run'}'", *DEFAULTS, *own, check=False)
        fedsb("federation", "status", str(server))
    return status


def set_up(node: Path, name: str, data: Path, server: Path) -> None:
    """Do what the operator of a node does, and what the server's does with its key."""
    fedsb("federation", "node-key", str(node / "key"), quiet=True)
    said = json.dumps({"client": name, "data": {"path": str(data)}, "device": "cpu"})
    shell(f"printf '%s\\n' {shlex.quote(said)} > {shlex.quote(str(node / 'node.yaml'))}")
    shell(shlex.join(["cp", str(server / "ca.crt"), str(node)]))
    shell(shlex.join(["mkdir", "-p", str(server / "nodes")]))
    shell(shlex.join(["cp", str(node / "key.pub"), str(server / "nodes" / f"{name}.pub")]))


@contextmanager
def side(folder: Path, ready: str, *arguments: str) -> Iterator[None]:
    """Run one side of the federation for the length of a block.

    Raises:
        DemoError: it did not begin.
    """
    log = folder / "out.log"
    show_command("federation", *arguments)
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen([*FEDSB, "federation", *arguments], stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + READY_S
        while ready not in log.read_text(encoding="utf-8"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise DemoError(f"'fedsb federation {arguments[0]}' did not begin:\n{tail(log)}")
            time.sleep(LOOK_S)
        yield
    finally:
        if process.poll() is None:
            fedsb("federation", "stop", str(folder), check=False)
        try:
            process.wait(LAST_S)
        except subprocess.TimeoutExpired:
            process.kill()


def shell(line: str) -> None:
    """Show a line of a shell and run it."""
    do(["sh", "-c", line], shown=line)


def fedsb(*arguments: str, check: bool = True, quiet: bool = False) -> int:
    """Run ``fedsb``; return its exit status."""
    return do([*FEDSB, *arguments], shown=shlex.join(["fedsb", *arguments]), check=check, quiet=quiet)


def do(command: Sequence[str], *, shown: str, check: bool = True, quiet: bool = False) -> int:
    """Show a command and run it.

    Raises:
        DemoError: it failed and must not.
    """
    print(f"$ {shown}", flush=True)
    done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL if quiet else None)
    if check and done.returncode:
        raise DemoError(f"'{shown}' ended with status {done.returncode}")
    return done.returncode


def show_command(*arguments: str) -> None:
    """Show a command of ours that runs in the background."""
    print(f"$ {shlex.join(['fedsb', *arguments])} &", flush=True)


def left_running(folder: Path) -> list[str]:
    """Return the processes that were started from below a folder and live."""
    found = []
    for process in psutil.process_iter():
        try:
            home = process.environ().get("FLWR_HOME", "")
            if process.status() != psutil.STATUS_ZOMBIE and home and Path(home).is_relative_to(folder):
                found.append(f"{process.name()} ({process.pid})")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
