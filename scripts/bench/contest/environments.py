"""Environments of the opponents, made from PyPI once."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

NEEDS: dict[str, tuple[str, ...]] = {
    "peft": ("torch", "transformers", "peft"),
    "opacus": ("opacus", "torch", "transformers", "peft"),
    "pfl": ("pfl==0.6.0", "torch", "transformers", "peft"),
    "flower": ("flwr[simulation]", "torch", "transformers", "peft", "accelerate", "psutil"),
}
OURS = ("torch", "transformers", "peft", "opacus", "flwr")  # at the versions that are installed here


def environment(name: str, folder: Path) -> Path:
    """Return the interpreter of an opponent's environment, made anew where what is installed here has changed since.

    Raises:
        SystemExit: its torch is another build than ours.
    """
    home = folder / name
    python, done = home / "bin" / "python", home / "installed"
    needs = [pinned(need) for need in NEEDS[name]]
    wanted = "\n".join([version("torch"), *needs])
    if not done.exists() or done.read_text() != wanted:
        print(f"installing the environment of {name} …", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *needs], check=True)
        ask = "from importlib.metadata import version; print(version('torch'))"
        theirs = subprocess.run([str(python), "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
        if theirs != version("torch"):
            raise SystemExit(f"{name} got torch {theirs}, ours is {version('torch')}: let pip find the same build (PIP_FIND_LINKS)")
        done.write_text(wanted)
    return python


def pinned(need: str) -> str:
    """Pin what is installed here too to the same version."""
    package = need.partition("[")[0]
    return f"{need}=={version(package).partition('+')[0]}" if package in OURS else need
