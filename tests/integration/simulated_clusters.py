"""Clusters on this machine with declared GPUs and labels; real Ray, no real GPU."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from ray.cluster_utils import Cluster

OBJECT_STORE = 100 * 2**20


@contextmanager
def simulated_cluster(nodes: Sequence[dict[str, Any]]) -> Iterator[Cluster]:
    """A head without GPUs and further nodes; what joins a cluster (``cluster.mode: ray``) finds it.

    Args:
        nodes: of each, what `Cluster.add_node` takes, such as ``num_gpus`` and ``labels``.
    """
    with patch.dict(os.environ, RAY_AUTH_MODE="disabled"):
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=2, object_store_memory=OBJECT_STORE)
            for node in nodes:
                cluster.add_node(num_cpus=16, object_store_memory=OBJECT_STORE, **node)
            with patch.dict(os.environ, RAY_ADDRESS=cluster.address):
                yield cluster
        finally:
            cluster.shutdown()
