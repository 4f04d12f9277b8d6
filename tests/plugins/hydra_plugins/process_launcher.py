"""A Hydra launcher that runs each job in a process of its own, as those of joblib and submitit do."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import cloudpickle
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn

ConfigStore.instance().store(
    group="hydra/launcher", name="process", node={"_target_": "hydra_plugins.process_launcher.ProcessLauncher"}, provider="tests"
)


class ProcessLauncher(BasicLauncher):
    """Hands the basic launcher's work to other processes, a job each."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            jobs = [
                (self.hydra_context, self.task_function, self.config, [job], initial_job_idx + i) for i, job in enumerate(job_overrides)
            ]
            # By value where need be: Hydra imports its plugins anew, so that their classes are not those of their modules.
            return [cloudpickle.loads(pool.submit(launched, cloudpickle.dumps((Singleton.get_state(), *job))).result()) for job in jobs]


def launched(pickled: bytes) -> bytes:
    """Run one job in this process."""
    state, context, task, config, overrides, number = cloudpickle.loads(pickled)
    Singleton.set_state(state)
    basic = BasicLauncher()
    basic.setup(hydra_context=context, task_function=task, config=config)
    found: bytes = cloudpickle.dumps(basic.launch(overrides, number)[0])
    return found
