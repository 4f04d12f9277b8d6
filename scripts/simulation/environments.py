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
    """Return the interpreter of an opponent's environment."""
    home = folder / name
    python, done = home / "bin" / "python", home / "installed"
    if not done.exists():
        print(f"installing the environment of {name} …", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        needs = [pinned(need) for need in NEEDS[name]]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check", *needs], check=True)
        done.touch()
    return python


def pinned(need: str) -> str:
    """Pin what is installed here too to the same version."""
    package = need.partition("[")[0]
    return f"{need}=={version(package).partition('+')[0]}" if package in OURS else need
