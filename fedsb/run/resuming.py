"""Going on with a run that was ended before its time: ``resume=<its folder>``.

The configuration is the run's own; what is given beside must agree with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsb.config.compose import as_dict, as_yaml, load, read
from fedsb.config.schema import Config, RuntimeConfig
from fedsb.core.errors import UserError

# What may differ: where things lie and run, not what comes out. The rest of `runtime`, its threads and its stack, decides the last bits.
FREE = (
    "resume", "output", "sweep", "keep_checkpoints", "plots", "progress", "log_level", "trackers", "cost",
    "frozen.cache_days", "frozen.cache_gb",
    "runtime.kind", "runtime.workers", "runtime.cpus",
    "runtime.gpus", "runtime.address", "runtime.max_retries", "runtime.client_timeout",
    "federation.min_replies", "federation.replace_nodes", "federation.node_keys", "federation.lost_state",
    "federation.wait", "federation.timeout",
)  # fmt: skip
OWN = ("keep_checkpoints", "plots", "progress", "log_level", "trackers")  # of the whole, that a run that goes on may be given anew
DATA_PATHS = ("data.path", "data.test_path", "data.public_path", "data.validation_path")
PATHS = (*DATA_PATHS, "model.name", "model.tokenizer")  # absolute where the run was begun
SWEEP = "manifest.json"  # of a sweep, which is no run
SEAL, BEGUN = "# fingerprint ", "# begun with "


def resumed(config: Config, overrides: Sequence[str]) -> Config:
    """Return the configuration of the run that ``config.resume`` names, or ``config`` where it names none.

    What may differ is that run's own too, but for what the overrides name.

    Args:
        config: composed from the overrides, its paths absolute.
        overrides: as given; what they set must be so in that run.

    Raises:
        UserError: no run is there, it has finished, or it was set up otherwise.
    """
    if config.resume is None:
        return config
    folder = Path(config.resume)
    if (folder / SWEEP).is_file():
        raise UserError(f"resume={folder}: that is a sweep; add -m to go on with what is left of it")
    if not (folder / "config.yaml").is_file():
        raise UserError(f"resume={folder}: there is no run (config.yaml is missing); give the output folder of one")
    if (folder / "summary.json").is_file():
        raise UserError(f"resume={folder}: that run has finished; begin another with output=…")
    if config.output not in (None, config.resume):
        raise UserError(f"output={config.output} with resume={folder}: a run goes on in its own folder; leave output out")
    stored = unsealed(folder / "config.yaml")
    named = {override.split("=")[0].lstrip("+~") for override in overrides}
    # `runtime=ray` says where to run, and nothing of the threads and the stack that its file begins with.
    chosen = _leaves(named - {"runtime"}, config)
    if differ := differences(config, stored, only={*chosen, *differences(config, load([]))}):
        said = chosen & differ.keys()
        shown = ", ".join(f"{key}={differ[key][0]} (that run: {differ[key][1]})" for key in sorted(said or differ)[:3])
        raise UserError(f"resume={folder}: {shown}; leave out what differs, or begin another run")
    own = {key: getattr(config, key) for key in OWN if _leaves({key}, config) & chosen}
    patience = {key: getattr(config.federation, key) for key in _named("federation", named) if is_free(f"federation.{key}")}
    federation = replace(stored.federation, **patience)
    return replace(stored, resume=str(folder), output=str(folder), runtime=_runtime(config, stored, named), federation=federation, **own)


def _runtime(config: Config, stored: Config, named: Set[str]) -> RuntimeConfig:
    """Return where a run goes on: where it was, or where the overrides say; with its own threads and stack."""
    moved = "runtime" in named and config.runtime.kind != stored.runtime.kind
    leaves = _named("runtime", named)
    base = replace(config.runtime, threads=stored.runtime.threads, stack=stored.runtime.stack) if moved else stored.runtime
    return replace(base, **{key: getattr(config.runtime, key) for key in leaves})


def _named(group: str, named: Set[str]) -> list[str]:
    """Return the keys of a group that are named one by one."""
    return [key for above, _, key in (name.partition(".") for name in named) if above == group and key]


def for_nodes(config: Config, overrides: Sequence[str], compose: Callable[[list[str]], Config]) -> list[str] | None:
    """Return the overrides that make a real node, which does not see the folder of a resumed run, train as that run did.

    Args:
        config: of the run.
        overrides: as given beside ``resume``.
        compose: makes a configuration of overrides.

    Returns:
        Those that the run was begun with, or the given ones; None where neither make the run's configuration: nobody must train with
        defaults for want of them.
    """
    own = [override for override in overrides if not is_free(override.split("=")[0].lstrip("+~"))]
    begun = _begun_with(Path(config.resume or "") / "config.yaml")
    return next((each for each in (begun, own) if each is not None and _makes(each, config, compose)), None)


def _makes(overrides: list[str], config: Config, compose: Callable[[list[str]], Config]) -> bool:
    """Tell whether nodes train as ``config`` says with these overrides; where relative paths begin is each node's own matter."""
    try:
        differ = differences(compose(overrides), config)
    except UserError:
        return False
    return all(key in PATHS and str(there).endswith(f"/{here}") for key, (here, there) in differ.items())


def _begun_with(path: Path) -> list[str] | None:
    lines = path.read_text(encoding="utf-8").splitlines()
    found: list[str] | None = next((json.loads(line.removeprefix(BEGUN)) for line in lines[1:2] if line.startswith(BEGUN)), None)
    return found


def differences(config: Config, other: Config, *, only: set[str] | None = None) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys, of ``only`` or of all that shape a result, at which two configurations differ, with both values."""
    mine, theirs = _flat(as_dict(config)), _flat(as_dict(other))
    keys = sorted(key for key in mine.keys() | theirs.keys() if not is_free(key) and (only is None or key in only))
    return {key: (mine.get(key), theirs.get(key)) for key in keys if mine.get(key) != theirs.get(key)}


def fingerprint(config: Config, *, without: Collection[str] = ()) -> str:
    """Return a hash of all that shapes a result, but for some keys: where :data:`PATHS` lead, say, which is each machine's own matter."""
    flat = {key: value for key, value in _flat(as_dict(config)).items() if not is_free(key) and key not in without}
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:16]


def sealed(config: Config, overrides: Sequence[str] | None = None) -> str:
    """Return the YAML of a configuration below a line with its fingerprint, and one with what it was composed from, if that is known."""
    begun = "" if overrides is None else f"{BEGUN}{json.dumps([each for each in overrides if not each.startswith('output=')])}\n"
    return f"{SEAL}{fingerprint(config)}: a run goes on only with what stands below\n{begun}{as_yaml(config)}"


def unsealed(path: Path) -> Config:
    """Read back what :func:`sealed` wrote.

    Raises:
        UserError: it is not the configuration that the run was begun with: what its ledgers hold was charged for that one.
    """
    config = read(path)
    if not path.read_text(encoding="utf-8").startswith(f"{SEAL}{fingerprint(config)}:"):
        raise UserError(f"'{path}' was changed since the run began, or is of another version; undo the change, or begin another run")
    return config


def is_free(key: str) -> bool:
    """Tell whether a dotted key decides nothing of what comes out; see :data:`FREE`."""
    return key in FREE or key.partition(".")[0] in FREE


def _leaves(named: Set[str], config: Config) -> set[str]:
    """Return the keys at or below those that are named; a group stands for all of its own."""
    return {key for key in _flat(as_dict(config)) for name in named if key == name or key.startswith(f"{name}.")}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
