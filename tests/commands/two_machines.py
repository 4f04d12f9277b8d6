"""A Ray cluster of two machines, which are processes here: prints its address, and takes the second one away at a line that it reads."""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

SIZE = {"num_cpus": 1, "memory": 3 * 2**30, "object_store_memory": 100 * 2**20, "include_dashboard": False}

if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args=SIZE)
    second = cluster.add_node(**SIZE)
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    if sys.stdin.readline():
        cluster.remove_node(second, allow_graceful=False)
        print("taken away", flush=True)
    sys.stdin.read()
    cluster.shutdown()
