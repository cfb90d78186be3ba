"""Print the living nodes of the Ray cluster and the memory of their GPUs.

One line of JSON: pairs of Ray's entry of a node and the GB of each of its GPUs, null if unknown.
`hardware.live_cluster` runs it as a process (``python -m rlhf_ray.doctor.live_nodes``), because
joining a cluster that refuses this user can hang.
"""

import json
import logging

import ray

from rlhf_ray.cluster.connection import require_cluster
from rlhf_ray.cluster.nodes import alive_nodes, on_nodes
from rlhf_ray.doctor.node_readings import NVIDIA_SMI_S, smallest_gpu_gb

NODES_TIMEOUT_S = NVIDIA_SMI_S + 5.0
"""For all nodes together; a driver that is not loaded yet takes seconds to list a node's GPUs."""


def main() -> None:
    """Join the cluster, read its nodes and print them."""
    require_cluster()
    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    nodes = alive_nodes()
    with_gpus = [node for node in nodes if node.entry["Resources"].get("GPU", 0)]
    answers = on_nodes(with_gpus, smallest_gpu_gb, [()] * len(with_gpus), NODES_TIMEOUT_S)
    memory_gb = {answer.node: answer.value for answer in answers}
    print(json.dumps([(node.entry, memory_gb.get(node)) for node in nodes], default=str))


if __name__ == "__main__":
    main()
