"""Generators join, leave, hang, are killed and come back during a run, on nodes that come and go.

A simulated cluster with real Ray, vLLM and DeepSpeed. What is sampled and learnt is that of a run
in which nothing happens.
"""

import asyncio
import dataclasses
import json
import math
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from model_families import TEXTS
from ray.cluster_utils import Cluster
from simulated_clusters import simulated_cluster
from tiny_models import build_servable, write_prompts

from rlhf_ray.config import Config, resolve
from rlhf_ray.generators.pool import GeneratorPool
from rlhf_ray.roles import Roles
from rlhf_ray.stages.pipeline import run_single
from rlhf_ray.stages.ppo import stage as ppo
from rlhf_ray.types import Shard, ShardRequest

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(590)]

ITERATIONS, BATCH_SIZE, SHARD_SIZE = 5, 24, 2
VARIES = ("timing_s/", "throughput/", "generators/")
"""Metrics that are of the clock, and of who was there."""
DEADLINE_S = 150.0
REWARD = """
def even(prompts, completions, **columns):
    return [sum(ord(c) % 2 == 0 for c in text) / (len(text) + 1) for text in completions]
"""


def make_config(folder: Path, name: str, model: str) -> Config:
    """A run without critic, reference of its own and reward model: three processes, and vLLM."""
    reward = folder / "reward.py"
    reward.write_text(REWARD, encoding="utf-8")
    prompts = write_prompts(folder / "prompts.jsonl", TEXTS)
    return resolve(
        {
            "run": {"dir": str(folder / name), "name": name, "stages": ["ppo"]},
            "cluster": {
                "mode": "ray",
                "call_timeout_s": 20.0,
                "env": {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"},
            },
            "placement": {"gpus": 0},
            "model": {"path": model, "max_length": 128},
            "sft": {"path": model},
            "data": {"prompts": {"path": str(prompts)}},
            "lora": {"r": 8},
            "reference": {"kind": "policy_base"},
            "rewards": [{"type": "function", "function": f"{reward}:even"}],
            "generators": {"max_in_flight": 2, "max_restarts": 2},
            "rollout": {"max_prompt_tokens": 64, "max_tokens": 64, "shard_size": SHARD_SIZE},
            "ppo": {
                "advantage": "rloo",
                "samples_per_prompt": 2,
                "iterations": ITERATIONS,
                "batch_size": BATCH_SIZE,
                "mini_batch_size": 12,
                "learning_rate": 1e-3,
                "eval_prompts": 8,
                "eval_every": 100,
            },
        }
    )


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A node with room for a policy, a scorer and a generator, and all its processes ended."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with tempfile.TemporaryDirectory(prefix="rlhf-", dir="/tmp") as temporary:
        monkeypatch.setattr(tempfile, "tempdir", temporary)
        try:
            with simulated_cluster(num_cpus=3) as made:
                yield made
        finally:
            for child in psutil.Process().children(recursive=True):
                if child.pid not in before:
                    child.kill()


class Watched:
    """The run's generators; remembers what was sampled, and acts on the way.

    Args:
        roles: of the run.
        before: called before each batch, with its version.
        amidst: called after the first shard of each batch.
    """

    def __init__(self, roles: Roles, before: Any, amidst: Any) -> None:
        assert isinstance(roles.generators, GeneratorPool)
        self.pool = roles.generators
        self.sampled: dict[tuple[int, int], tuple[str, list[int]]] = {}
        """(version, position) -> prompt and response."""
        self._fetch = roles.fetch
        self._before, self._amidst = before, amidst

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pool, name)

    async def generate(
        self, requests: Sequence[ShardRequest], *, or_newer: bool = False
    ) -> AsyncIterator[Shard]:
        version, is_batch = requests[0].version, len(requests) * SHARD_SIZE == BATCH_SIZE
        if is_batch:
            await self._before(self, version)
        first = True
        async for shard in self.pool.generate(requests, or_newer=or_newer):
            if is_batch:
                for rollout in await self._fetch(shard.rollouts):
                    key = (version, rollout.position)
                    assert key not in self.sampled, f"{key} came twice"
                    self.sampled[key] = (rollout.prompt.id, rollout.response_ids.tolist())
                if first:
                    await self._amidst(self, version)
                    first = False
            yield shard

    def states(self) -> dict[str, str]:
        return {status.name: status.state for status in self.pool.statuses()}

    async def wait_until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not holds():
            assert time.monotonic() < deadline, f"still {self.pool.statuses()}"
            await asyncio.sleep(0.05)

    async def ask(self, name: str, question: Callable[[Any], Any]) -> Any:
        """Have a generator's process answer a lambda: this module is not known there."""
        worker: Any = next(m.client.worker for m in self.pool._members if m.name == name)
        return await worker.actor.__ray_call__.remote(question)


async def nothing(watched: Watched, version: int) -> None:
    """Nothing happens."""


class Unrest:
    """The disturbances of a run, by version: see the branches."""

    def __init__(self, cluster: Cluster) -> None:
        self.nodes: set[str] = set()
        """Nodes on which generators were."""
        self.sampling: set[str] = set()
        """Those that had prompts of a batch."""
        self.silent: list[int] = []
        """Processes of an engine that were stopped, while its generator still answered."""
        self._cluster = cluster

    async def before(self, watched: Watched, version: int) -> None:
        if version == 1:  # the next engine is up: it needs what the stopped one has held
            assert self.silent
            assert not [pid for pid in self.silent if psutil.pid_exists(pid)]
        elif version in (2, 3):
            await watched.wait_until(lambda: list(watched.states().values()) == ["ready"] * 2)
            for name in watched.states():
                self.nodes.add(
                    await watched.ask(name, lambda _: ray.get_runtime_context().get_node_id())
                )
        elif version == 4:
            await watched.wait_until(lambda: list(watched.states().values()) == ["ready"])

    async def amidst(self, watched: Watched, version: int) -> None:
        self.sampling |= {member.name for member in watched.pool._members if member.load}
        if version == 0:
            self.silent = await watched.ask(
                "generator-0", lambda _: [c.pid for c in psutil.Process().children(recursive=True)]
            )
            for pid in self.silent:
                os.kill(pid, signal.SIGSTOP)
        elif version == 1:
            self._cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)  # in this thread
            watched.pool.scale_to(2)
        elif version == 2:
            assert next(m for m in watched.pool._members if m.name == "generator-1").load
            os.kill(await watched.ask("generator-1", lambda _: os.getpid()), signal.SIGKILL)
        elif version == 3:
            watched.pool.scale_to(1)


def run(config: Config, before: Any, amidst: Any) -> tuple[Watched, dict[str, Any]]:
    """The stage ppo, watched."""
    watched: list[Watched] = []
    original = ppo.ppo_roles

    @asynccontextmanager
    async def watched_roles(*args: Any) -> AsyncIterator[Roles]:
        async with original(*args) as roles:
            watched.append(Watched(roles, before, amidst))
            generators: Any = watched[0]
            yield dataclasses.replace(roles, generators=generators)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "ppo_roles", watched_roles)
        folder = run_single(config, "ppo")
    return watched[0], json.loads((folder / "ppo" / "summary.json").read_text(encoding="utf-8"))


def metrics(config: Config) -> list[dict[str, Any]]:
    path = Path(config.run.dir or "") / "ppo" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_silent_engine_joins_leaves_and_a_kill_lose_and_double_nothing(
    cluster: Cluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = build_servable(tmp_path / "model", TEXTS)
    calm_config = make_config(tmp_path, "calm", model)
    calm, _ = run(calm_config, nothing, nothing)
    config = make_config(tmp_path, "unrest", model)
    unrest = Unrest(cluster)
    disturbed, summary = run(config, unrest.before, unrest.amidst)
    said = "".join(capfd.readouterr())

    positions = {(version, p) for version in range(ITERATIONS) for p in range(BATCH_SIZE)}
    assert set(disturbed.sampled) == positions
    assert disturbed.sampled == calm.sampled, "other prompts, or other responses to them"
    assert summary["samples_generated"] == summary["samples_learnt"] == len(positions)
    for record, undisturbed in zip(metrics(config), metrics(calm_config), strict=True):
        for name, value in undisturbed.items():
            if not name.startswith(VARIES):
                assert math.isclose(record[name], value, rel_tol=1e-4, abs_tol=1e-4), (
                    f"iteration {record['iteration']}: {name} {record[name]} against {value}"
                )
    assert summary["generator_restarts"] == 2
    assert summary["samples_requeued"] >= 2 * SHARD_SIZE
    assert [record["generators/target"] for record in metrics(config)] == [1, 2, 2, 1, 1]
    assert len(unrest.nodes) == 2, "none was on the node that joined"
    assert unrest.sampling == {"generator-0", "generator-1"}
    assert "generator-0 did not answer generate, awaited by the driver since" in said
    assert "the last 20 s (cluster.call_timeout_s) without any progress. It last reported: " in said
