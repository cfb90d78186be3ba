"""Measure the bandwidth between nodes, by plain TCP between their addresses in the cluster."""

import itertools
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_ray.cluster.nodes import ClusterNode

SECONDS = 1.0
"""Duration of the measurement of a pair."""
CHUNK_BYTES = 2**20
CONNECT_S = 5.0
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Link:
    """The measured link from one node to another."""

    sender: str
    receiver: str
    gbit_s: float
    """0 if they cannot connect."""
    problem: str = ""


class Peer:
    """An actor that sends and receives on one node."""

    def __init__(self, address: str) -> None:
        self._server = socket.create_server(
            (address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET
        )
        threading.Thread(target=self._serve, daemon=True).start()

    def port(self) -> int:
        """Return the port on which it sends to anyone who connects."""
        return self._server.getsockname()[1]

    def _serve(self) -> None:
        chunk = bytes(CHUNK_BYTES)
        while True:
            connection, _ = self._server.accept()
            with connection:
                connection.settimeout(CONNECT_S)
                try:
                    while True:
                        connection.sendall(chunk)
                except OSError:
                    continue  # the receiver has closed the connection after its measurement

    def receive(self, address: str, port: int) -> float:
        """Measure how many Gbit/s another peer sends to this one."""
        buffer, received = bytearray(CHUNK_BYTES), 0
        with socket.create_connection((address, port), timeout=CONNECT_S) as connection:
            started = time.perf_counter()
            while time.perf_counter() - started < SECONDS:
                received += connection.recv_into(buffer)
            return received * 8 / (time.perf_counter() - started) / 1e9


def measure(nodes: Sequence[ClusterNode]) -> list[Link]:
    """Measure every pair of nodes, one after the other so that they do not share a link."""
    peers: dict[ClusterNode, Any] = {
        node: ray.remote(Peer)
        .options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        )
        .remote(node.address)
        for node in nodes
    }
    try:
        pairs = itertools.combinations(nodes, 2)
        return [_link(sender, receiver, peers) for sender, receiver in pairs]
    finally:
        for peer in peers.values():
            ray.kill(peer)


def _link(sender: ClusterNode, receiver: ClusterNode, peers: Mapping[ClusterNode, Any]) -> Link:
    try:
        port = ray.get(peers[sender].port.remote(), timeout=TIMEOUT_S)
        receiving = peers[receiver].receive.remote(sender.address, port)
        return Link(sender.name, receiver.name, ray.get(receiving, timeout=TIMEOUT_S))
    except (RayError, TimeoutError, OSError) as error:
        return Link(sender.name, receiver.name, 0.0, str(error).strip().splitlines()[-1])
