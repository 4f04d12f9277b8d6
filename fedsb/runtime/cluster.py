"""Ray on this machine, or a cluster that is there."""

from __future__ import annotations

import os
import shlex
import socket
import sys

import ray

from fedsb.errors import RunError, UserError
from fedsb.logs import last_line

RAY_SWITCHES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # 15 by default, and any other work on the machine would stop a run
}


def start_ray(address: str | None) -> None:
    """Start Ray on this machine, or join a cluster.

    Raises:
        UserError: there is no cluster at the address.
        RunError: Ray does not start on this machine.
    """
    if ray.is_initialized():
        return
    for name, value in RAY_SWITCHES.items():
        os.environ.setdefault(name, value)
    # Ray pastes the interpreter's path into a shell line.
    quoted = shlex.quote(sys.executable)
    runtime_env = {} if quoted == sys.executable or address else {"py_executable": quoted}
    try:
        _knock(address)
        ray.init(address=address or "local", include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env=runtime_env)
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
