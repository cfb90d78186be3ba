"""A Ray cluster of this machine whose nodes can be killed, in a process of its own.

Usage: python -m kills.nodes HEAD_CPUS NODE_CPUS
Prints the head's address, then for each line that it reads the raylet's process id of a new node;
ends the cluster when there is nothing more to read.
"""

import subprocess
import sys
from typing import Any

OBJECT_STORE = 100 * 2**20
ENDS_S = 60.0


class Nodes:
    """A head, and nodes that can be killed.

    Args:
        head_cpus: logical CPUs of the head.
        node_cpus: of each other node.
        environment: of all processes.
        log: file for what they print.
    """

    def __init__(
        self, head_cpus: int, node_cpus: int, environment: dict[str, str], log: Any
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kills.nodes", str(head_cpus), str(node_cpus)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
        )
        self.address = self._answer()
        self.raylets: list[int] = []
        """Process ids, without the head's."""
        self.add()

    def add(self) -> None:
        """Add a node."""
        assert self._process.stdin
        print(file=self._process.stdin, flush=True)
        self.raylets.append(int(self._answer()))

    def _answer(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline().strip()
        if not line:
            raise RuntimeError("The simulated cluster has ended")
        return line

    def close(self) -> None:
        """End the cluster."""
        self._process.communicate(timeout=ENDS_S)


def _serve(head_cpus: int, node_cpus: int) -> None:
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray.cluster_utils import Cluster

    ensure_token_if_auth_enabled()
    cluster = Cluster()

    def add(num_cpus: int) -> int:
        node = cluster.add_node(
            num_cpus=num_cpus,
            object_store_memory=OBJECT_STORE,
            include_dashboard=False,
        )
        return node.all_processes["raylet"][0].process.pid

    add(head_cpus)
    print(cluster.address, flush=True)
    for _ in sys.stdin:
        print(add(node_cpus), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
