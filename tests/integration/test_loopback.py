"""A run on one machine cannot be reached from outside it."""

import ipaddress
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from rlhf_ray.cluster.session import ray_session
from rlhf_ray.config import Config, resolve
from rlhf_ray.engines.deepspeed.engine import join_group
from rlhf_ray.engines.factory import generation_engine

pytestmark = pytest.mark.integration


class Rank:
    """A learner's rank, as far as the network is concerned."""

    def join(self, rank: int, port: int) -> None:
        join_group(rank, 2, "127.0.0.1", port, 120)


class Engine:
    """A generator's engine."""

    async def start(self, config: Config, model: str) -> None:
        self._engine = generation_engine(config, model, ())
        await self._engine.start()


def listening() -> Iterator[str]:
    """Sockets of this process and its descendants that others could connect to."""
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        for connection in process.net_connections("inet"):
            address = ipaddress.ip_address(connection.laddr.ip)
            mapped = getattr(address, "ipv4_mapped", None) or address
            if connection.status == psutil.CONN_LISTEN and not mapped.is_loopback:
                yield f"{process.name()} {connection.laddr}"


def test_every_socket_listens_on_loopback_alone_and_no_hub_is_asked(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    config = resolve(
        {
            "run": {"dir": str(tmp_path)},
            "cluster": {"mode": "local"},
            "rollout": {"max_prompt_tokens": 32, "max_tokens": 32},
            "model": {"path": llama, "max_length": 64},
        }
    )
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    with ray_session(config):
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
        left_s, _ = signal.getitimer(signal.ITIMER_REAL)  # pytest's own time limit is longer
        assert not 0 < left_s <= 3, "Ray's core would abort the process"
        signal.signal(signal.SIGTERM, before)
        assert ray.nodes()[0]["NodeManagerAddress"] == "127.0.0.1"
        engine = ray.remote(Engine).remote()
        ranks = [ray.remote(num_cpus=1)(Rank).remote() for _ in range(2)]
        joined = [rank.join.remote(i, 29611) for i, rank in enumerate(ranks)]
        ray.get([engine.start.remote(config, llama), *joined], timeout=300)
        assert not list(listening())
        # By default Ray's workers would be nicer: beside a busy program they would stand still.
        niceness = engine.__ray_call__.remote(lambda _: os.nice(0))
        assert ray.get(niceness, timeout=60) == os.nice(0)
