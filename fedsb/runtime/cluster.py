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

CARDS = Path("/dev/nvidia0")  # is there where NVIDIA's driver is
_STARTING = threading.Lock()


def start_early() -> None:
    """Begin to start Ray on this machine while the caller imports what else it needs; :func:`start_ray` waits for it.

    Where there are GPUs nothing is begun: how many of them Ray hands out follows from what the workers ask for. A start that fails is tried
    again by whoever needs Ray, and told then.
    """
    if not CARDS.exists():
        done = threading.Event()
        threading.Thread(target=_begin, args=(done,), name="ray-start", daemon=True).start()
        atexit.register(done.wait)  # before Ray's own, which ends what is there by then


def _begin(done: threading.Event) -> None:
    with suppress(RunError):
        start_ray(None)
    done.set()
    # Ray's processes are told to die with the thread that started them.
    threading.Event().wait()


def start_placed(address: str | None, device: str, share: float | None, workers: int | None) -> Placement:
    """Start Ray or join a cluster, and say where workers and driver compute; for the arguments see :func:`fedsb.runtime.placement.place`.

    Raises:
        UserError, RunError: see :func:`start_ray`.
    """
    # It takes seconds to import, and Ray is started beside that.
    import torch

    cards = torch.cuda.device_count() if address is None and not ray.is_initialized() else 0
    if cards:
        placement = place(device, share, workers, cards, own=True)
        start_ray(None, placement.cards)
        return placement
    start_ray(address)
    return place(device, share, workers, int(ray.cluster_resources().get("GPU", 0)), own=False)


def start_ray(address: str | None, cards: int | None = None) -> None:
    """Start Ray on this machine, with as many GPUs to hand out as ``cards`` says (None: all that it finds), or join a cluster.

    Raises:
        UserError: there is no cluster at the address.
        RunError: Ray does not start on this machine.
    """
    with _STARTING:
        if not ray.is_initialized():
            _start(address, cards)


def _start(address: str | None, cards: int | None) -> None:
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
        raise UserError(
            f"no Ray cluster at runtime.address={address} ({said}); start one with 'ray start --head', or leave it out"
        ) from None


def _knock(address: str | None) -> None:
    """Look whether anyone listens: Ray itself keeps trying for minutes.

    Raises:
        OSError: nobody does.
    """
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5.0).close()
