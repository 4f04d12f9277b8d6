"""Ray on this machine, or a cluster that is there."""

from __future__ import annotations

import atexit
import os
import shlex
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

import ray

from fedsb.core.errors import RunError, UserError
from fedsb.core.logs import last_line
from fedsb.runtime.placement import Placement, place

RAY_SWITCHES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # 15 by default, and any other work on the machine would stop a run
}

CARDS = ("nvidia[0-9]*", "kfd", "dxg")  # in /dev, where there is a driver of NVIDIA's, AMD's, or Windows' below
GRACE_S = 5.0  # for a start of Ray that nobody needs any more, before Python ends
_STARTING = threading.Lock()
_here = threading.Event()  # whether the Ray of this process is one that it has started


def start_early() -> None:
    """Begin to start Ray on this machine while the caller imports what else it needs; :func:`start_ray` waits for it.

    Where there are GPUs nothing is begun: how many of them Ray hands out follows from what the workers ask for. A start that fails is tried
    again by whoever needs Ray, and told then.
    """
    if not any(found for pattern in CARDS for found in Path("/dev").glob(pattern)):
        done = threading.Event()
        threading.Thread(target=_begin, args=(done,), name="ray-start", daemon=True).start()
        atexit.register(_await, done)  # before Ray's own, which ends what is there by then


def _begin(done: threading.Event) -> None:
    with suppress(RunError):
        start_ray(None)
    done.set()
    # Ray's processes are told to die with the thread that started them.
    threading.Event().wait()


def _await(done: threading.Event) -> None:
    """Give a start that nobody needs any more a moment, or its last processes notice within a minute only that they are alone.

    To kill them would be worse: Ray's library ends the process that waits for them, with a status of its own.
    """
    with suppress(KeyboardInterrupt):
        done.wait(GRACE_S)


def start_placed(address: str | None, device: str, share: float | None, workers: int | None) -> Placement:
    """Start Ray or join a cluster, and say where workers and driver compute; for the arguments see :func:`fedsb.runtime.placement.place`.

    Raises:
        UserError, RunError: see :func:`start_ray`.
    """
    # It takes seconds to import, and Ray is started beside that.
    import torch

    with _STARTING:  # what was begun early counts as started
        fresh = address is None and not ray.is_initialized()
    cards = torch.cuda.device_count() if fresh else 0
    if cards:
        placement = place(device, share, workers, cards, own=True)
        start_ray(None, placement.cards)
        return placement
    start_ray(address)
    return place(device, share, workers, int(ray.cluster_resources().get("GPU", 0)), own=False)


def start_ray(address: str | None, cards: int | None = None, *, key: str = "runtime.address") -> None:
    """Start Ray on this machine, with as many GPUs to hand out as ``cards`` says (None: all that it finds), or join a cluster.

    One on this machine that was begun before anybody knew of the cluster is ended. ``key`` is that of the address.

    Raises:
        UserError: there is no cluster at the address.
        RunError: Ray does not start on this machine.
    """
    with _STARTING:
        if address is not None and _here.is_set():
            ray.shutdown()
            _here.clear()
        if not ray.is_initialized():
            _start(address, cards, key)
            if address is None:
                _here.set()


def _start(address: str | None, cards: int | None, key: str) -> None:
    for name, value in RAY_SWITCHES.items():
        os.environ.setdefault(name, value)
    # Ray pastes the interpreter's path into a shell line.
    quoted = shlex.quote(sys.executable)
    runtime_env = {} if quoted == sys.executable or address else {"py_executable": quoted}
    given = {"runtime_env": runtime_env} | ({} if cards is None or address else {"num_gpus": cards})
    try:
        _knock(address)
        ray.init(address=address or "local", include_dashboard=False, log_to_driver=False, logging_level="ERROR", **given)
    except Exception as error:  # Ray has no class for it, and raises bare ones where its processes die or are late
        if address is None:
            raise RunError(f"Ray does not start on this machine: {last_line(str(error))}") from error
        said = " ".join(str(error).split())[:160]
        raise UserError(f"no Ray cluster at {key}={address} ({said}); start one with 'ray start --head', or leave it out") from None


def _knock(address: str | None) -> None:
    """Look whether anyone listens: Ray itself keeps trying for minutes.

    Raises:
        OSError: nobody does.
    """
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5.0).close()
