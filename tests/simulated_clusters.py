"""Clusters on this machine with declared GPUs and labels; real Ray, no real GPU."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import ray
from ray._private.authentication.authentication_token_setup import (
    enable_token_auth_by_default,
    ensure_token_if_auth_enabled,
)
from ray.cluster_utils import Cluster

OBJECT_STORE = 100 * 2**20


@contextmanager
def simulated_cluster(nodes: Sequence[dict[str, Any]] = (), num_cpus: int = 2) -> Iterator[Cluster]:
    """A head without GPUs and further nodes; what joins a cluster (``cluster.mode: ray``) finds it.

    Its processes ask for a token, as those of a local session do: Ray keeps one answer to that for
    the length of a process.

    Args:
        nodes: of each, what `Cluster.add_node` takes, such as ``num_gpus`` and ``labels``.
        num_cpus: of the head.
    """
    enable_token_auth_by_default()
    ensure_token_if_auth_enabled()
    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=num_cpus, object_store_memory=OBJECT_STORE)
        for node in nodes:
            cluster.add_node(object_store_memory=OBJECT_STORE, **{"num_cpus": 16} | node)
        cluster.wait_for_nodes()
        with patch.dict(os.environ, RAY_ADDRESS=cluster.address):
            yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
