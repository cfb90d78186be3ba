"""Groups of ranks for DeepSpeed's tests, forked off a process that has imported it."""

import multiprocessing
import socket
from contextlib import suppress
from queue import Empty
from typing import Any

# It takes ten seconds to import.
RANKS = multiprocessing.get_context("forkserver")
RANKS.set_forkserver_preload(
    [
        *("torch", "transformers", "peft", "deepspeed", "datasets"),
        *("rlhf_ray.config", "rlhf_ray.engines.deepspeed.engine", "rlhf_ray.models.adapters"),
        *("rlhf_ray.algorithms.experience", "rlhf_ray.models.forward"),
    ]
)


def in_group(main: Any, world_size: int, *arguments: Any) -> Any:
    """Run a group of ranks in processes; what rank 0 puts into its queue."""
    queue = RANKS.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        RANKS.Process(target=main, args=(rank, world_size, port, *arguments, queue))
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    try:
        for _ in range(200):
            with suppress(Empty):
                return queue.get(timeout=1)
            assert all(rank.is_alive() or not rank.exitcode for rank in ranks), "a rank has failed"
        raise TimeoutError
    finally:
        for rank in ranks:
            rank.join(timeout=30)
            rank.kill()
