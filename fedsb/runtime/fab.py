"""Run the submitted code, whatever lies in the folder in which Flower's daemon was started.

Flower's simulation loads the apps from the unpacked bundle, but Ray puts the *working folder of the simulation process*, which is the
daemon's, before everything else on the import path of its actors. An actor receives the ClientApp by reference and imports it by name:
where that folder holds a checkout, simulated clients run the checkout and not what was submitted.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

LAUNCH_FOLDER = "FEDSB_LAUNCH_FOLDER"
RAY_HOOK = "RAY_RUNTIME_ENV_HOOK"
_SIMULATION = "flwr-simulation"


def app_root() -> Path:
    """Return the folder that holds this copy of the ``fedsb`` package."""
    return Path(__file__).resolve().parents[2]


def launch_folder() -> Path:
    """Return the folder that relative paths of a configuration refer to: where the process stood before :func:`prefer_submitted_code`."""
    return Path(os.environ.get(LAUNCH_FOLDER) or Path.cwd())


def prefer_submitted_code() -> None:
    """Make the folder of this package the first place that this process and its Ray actors import from.

    Both apps call it at import, before anything of ``strategies`` or ``clients`` is imported and before Flower starts Ray. In Flower's
    simulation process the working folder changes to the bundle; elsewhere it stays.
    """
    root = str(app_root())
    in_simulation = Path(sys.argv[0]).name == _SIMULATION
    if in_simulation or (app_root() / "pyproject.toml").is_file():
        # Flower takes its own entry away again while it validates the app, and the ServerApp imports in another thread meanwhile.
        sys.path.insert(0, root)
    if in_simulation:
        os.environ.setdefault(LAUNCH_FOLDER, str(Path.cwd()))
        os.chdir(root)
        if shlex.quote(sys.executable) != sys.executable:
            os.environ.setdefault(RAY_HOOK, f"{__name__}.{quote_interpreter.__name__}")


def quote_interpreter(runtime_env: dict[str, Any] | None) -> dict[str, Any]:
    """Complete Ray's runtime environment with this interpreter, quoted.

    Ray pastes the path of the interpreter into a shell line as it is, so that no worker starts from an environment whose path holds a
    space. Flower leaves nothing of ``ray.init`` to the app; Ray calls this by the name in ``RAY_RUNTIME_ENV_HOOK``.
    """
    return {"py_executable": shlex.quote(sys.executable), **(runtime_env or {})}
