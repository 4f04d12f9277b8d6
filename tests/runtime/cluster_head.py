"""A Ray cluster of a process of its own: prints its address, then, for each line that it reads, how many CPUs it has and are free."""

from __future__ import annotations

import sys

import ray

if __name__ == "__main__":
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    print(ray.get_runtime_context().gcs_address, flush=True)
    for _ in sys.stdin:
        print(ray.cluster_resources()["CPU"], ray.available_resources().get("CPU", 0.0), flush=True)
    ray.shutdown()
