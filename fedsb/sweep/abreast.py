"""How many jobs of a sweep run side by side: what CPUs, GPUs and memory allow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from fedsb.config.schema import Config, ModelConfig
from fedsb.core.errors import UserError
from fedsb.models.loading import place_of
from fedsb.runtime.process_memory import available_bytes

BARE = 2**30  # what a process holds beside its model: torch, transformers, data, activations of a small batch
COPIES = 3  # of a model's files: as they are read, in float32, and what training adds
WEIGHTS = (".safetensors", ".bin", ".gguf")


def abreast(wanted: int | str, configs: Sequence[Config]) -> tuple[int, int]:
    """Return how many jobs run side by side, and how many GPUs there are for them to take in turn.

    Args:
        wanted: ``sweep.jobs``: a number, which is taken, or ``auto``.
        configs: of the jobs that are to run.

    Raises:
        UserError: several are wanted of jobs whose clients run side by side on Ray, which takes the machine for one job.
    """
    if any(config.runtime.kind != "local" for config in configs):
        if wanted not in (1, "auto"):
            raise UserError(f"sweep.jobs={wanted} with runtime=ray: a job's workers take the machine; leave one of the two out")
        return 1, 0
    cards = torch.cuda.device_count() if any(config.device != "cpu" for config in configs) else 0
    if isinstance(wanted, int):
        return min(wanted, len(configs)), cards
    threads = max(config.runtime.threads for config in configs)
    fits = [cores() // threads, available_bytes() // max(job_bytes(config.model) for config in configs), *([cards] if cards else [])]
    return max(1, min(*fits, len(configs))), cards


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def job_bytes(model: ModelConfig) -> int:
    """Estimate the memory of a job by the files of its model; of one that is at a hub, or made up, without it."""
    try:
        place = Path(place_of(model)) if model.kind != "config" else None
    except UserError:  # the job will say so
        return BARE
    if place is None or not place.exists():
        return BARE
    files = [place] if place.is_file() else [path for path in place.iterdir() if path.suffix in WEIGHTS]
    return BARE + COPIES * sum(path.stat().st_size for path in files)
