"""What ``fedsb doctor`` looks at. Each check imports what it tries, so that a package that is missing costs one line."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]  # typeshed leaves it out

from fedsb.core.folders import check_makeable, home

PORT = 18000  # of a SuperLink, unless told otherwise
GB = 10**9
CARDS = ("nvidia[0-9]*", "kfd")  # in /dev, where there is a driver of NVIDIA's or AMD's
TRUE, FALSE = ("1", "ON", "YES", "TRUE"), ("", "0", "OFF", "NO", "FALSE")  # as huggingface_hub reads them
HUB_S = 3.0
PROXY = "_proxy"  # ends the names of variables that name one


class Verdict(NamedTuple):
    """Whether a check is passed, and a line: what was found, and where it would fail what to do."""

    well: bool
    said: str


@dataclass(frozen=True)
class Machine:
    """What is looked at.

    Attributes:
        output: folder that runs are written below.
        port: that a SuperLink would listen on.
        shared: where shared memory lies.
        least_shared, least_memory, least_disk: bytes that must be free.
        cards: files of graphics cards.
        environment: variables.
        needs: requirements; None: those of the installed package.
    """

    output: Path = Path("outputs")
    port: int = PORT
    shared: Path = Path("/dev/shm")
    least_shared: int = GB // 2
    least_memory: int = 2 * GB
    least_disk: int = GB
    cards: Sequence[str] = tuple(f"/dev/{pattern}" for pattern in CARDS)
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    needs: Sequence[str] | None = None


def versions(machine: Machine) -> Verdict:
    """Say what is installed."""
    told = (f"{name} {_version(name) or 'missing'}" for name in ("fedsb", "flwr", "torch", "transformers", "opacus", "ray"))
    return Verdict(True, f"{', '.join(told)}, Python {platform.python_version()} on {platform.system()} {platform.machine()}")


def packages(machine: Machine) -> Verdict:
    """Hold what is installed against what the package asks for."""
    from packaging.requirements import Requirement

    wanted = map(Requirement, (requires("fedsb") or ()) if machine.needs is None else machine.needs)
    due = [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    found = {each: _version(each.name) for each in due}
    bad = {each: f"{each.name} is {there or 'missing'}" for each, there in found.items() if not there or there not in each.specifier}
    if bad:
        install = " ".join(f"'{each.name}{each.specifier}'" for each in bad)
        return Verdict(False, f"{', '.join(bad.values())}; pip install {install}")
    return Verdict(True, f"{len(due)} there, each of a series that was tested")


def gpu(machine: Machine) -> Verdict:
    """Say which GPUs torch takes, and whether it leaves one unused."""
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return Verdict(True, ", ".join(f"{card.name} with {card.total_memory / GB:.0f} GB" for card in cards))
    there = [str(path) for pattern in machine.cards for path in Path("/").glob(pattern.lstrip("/"))]
    if there:
        remedy = "install its driver, and a build of torch for it (pytorch.org)"
        return Verdict(False, f"{there[0]} is there, and torch {torch.__version__} doesn't take it; {remedy}")
    return Verdict(True, "none; device=auto takes the CPU")


def memory(machine: Machine) -> Verdict:
    """Say how much memory is left, a container's limit included."""
    from fedsb.runtime.process_memory import available_bytes

    return _enough(available_bytes(), machine.least_memory, "left to this process", "end other processes, or raise the container's limit")


def shared_memory(machine: Machine) -> Verdict:
    """Say how much room there is for what Ray's processes share."""
    remedy = "runtime=ray would share weights through files: docker run --shm-size=2g, or runtime=local"
    if not machine.shared.is_dir():
        return Verdict(False, f"{machine.shared} is missing; {remedy}")
    return _enough(shutil.disk_usage(machine.shared).free, machine.least_shared, f"free in {machine.shared}", remedy)


def folders(machine: Machine) -> Verdict:
    """Try what runs write to."""
    places = {
        "FEDSB_HOME": (home(), "set FEDSB_HOME to a folder of yours"),
        "output": (machine.output, "say output=FOLDER"),
        "TMPDIR": (Path(tempfile.gettempdir()), "set TMPDIR to a folder of yours"),
    }
    bad = [f"{why}; {remedy}" for name, (folder, remedy) in places.items() if (why := _unwritable(folder, name))]
    told = ", ".join(f"{name} {folder}" for name, (folder, _) in places.items())
    return Verdict(not bad, ". ".join(bad) or told)


def disk(machine: Machine) -> Verdict:
    """Say how much room there is for what runs leave."""
    place = _nearest(machine.output)
    return _enough(shutil.disk_usage(place).free, machine.least_disk, f"free at {place}", "free some, or say output=FOLDER elsewhere")


def offline(machine: Machine) -> Verdict:
    """Say whether hubs are asked, and whether they answer where they are."""
    said = {name: machine.environment.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    for name, value in said.items():
        if value.upper() not in (*TRUE, *FALSE):
            return Verdict(False, f"{name}={value} counts as off; set it to 1 or 0")
    # The second counts where the first is empty, and not where it is off.
    if next(filter(None, said.values()), "").upper() in TRUE:
        return Verdict(True, "models and data come from folders, packages and the hub's cache; nothing is asked for")
    name, place = _way_to(machine.environment.get("HF_ENDPOINT") or "https://huggingface.co", machine.environment)
    try:
        socket.create_connection(place, timeout=HUB_S).close()
    except OSError as error:
        why = f"{name} doesn't answer ({(error.strerror or str(error)).lower()})"
        return Verdict(False, f"{why}, and what is named as there would wait for it; set HF_HUB_OFFLINE=1")
    return Verdict(True, f"{name} answers; HF_HUB_OFFLINE=1 keeps runs from asking it")


def port(machine: Machine) -> Verdict:
    """Try to listen where a SuperLink would."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", machine.port))
        except OSError as error:
            why = f"{machine.port} can't be listened on ({(error.strerror or str(error)).lower()})"
            return Verdict(False, f"{why}; end what listens there, or take another: fedsb federation server FOLDER --port N")
    return Verdict(True, f"{machine.port} is free for a SuperLink")


def smoke(machine: Machine) -> Verdict:
    """Run a small federation."""
    from fedsb.commands.smoke import smoke_run

    begun = time.monotonic()
    bytes_moved = smoke_run()
    return Verdict(True, f"two clients, one round, {bytes_moved:,} bytes moved, {time.monotonic() - begun:.1f} s")


def _enough(there: int, least: int, where: str, remedy: str) -> Verdict:
    told = f"{there / GB:.1f} GB {where}"
    return Verdict(True, told) if there >= least else Verdict(False, f"{told}, of at least {least / GB:.1f} GB; {remedy}")


def _way_to(address: str, environment: Mapping[str, str]) -> tuple[str, tuple[str, int]]:
    """Return what a request to an address asks, and where that is: its host, or the proxy that the environment names for it."""
    asked = urlsplit(address)
    proxies = {key[: -len(PROXY)].lower(): value for key, value in environment.items() if key.lower().endswith(PROXY) and value}
    proxy = proxies.get(asked.scheme) or proxies.get("all")
    if proxy is None or proxy_bypass_environment(asked.hostname or "", proxies):
        return str(asked.hostname), (asked.hostname or "", asked.port or (80 if asked.scheme == "http" else 443))
    through = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    return f"the proxy {through.hostname}", (through.hostname or "", through.port or 80)


def _unwritable(folder: Path, name: str) -> str:
    """Say why nothing can be written below a folder; nothing where it can."""
    try:
        check_makeable(folder, name)
        _write_in(folder)
    except Exception as error:  # whatever a file system says
        return str(error).removesuffix("; choose another folder")
    return ""


def _write_in(folder: Path) -> None:
    """Write a file where a folder is or would be made; root may all that a mode forbids, but no file system that is mounted to be read."""
    with tempfile.NamedTemporaryFile(dir=_nearest(folder)) as file:
        file.write(b"fedsb doctor")
        file.flush()


def _nearest(folder: Path) -> Path:
    """Return a folder, or the one above it that is there."""
    above: Iterable[Path] = (folder.absolute(), *folder.absolute().parents)
    return next(each for each in above if each.is_dir())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
