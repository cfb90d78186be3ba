"""Processes of every role but generators are killed during a run, which neither ends nor differs.

Real Ray and DeepSpeed, one session for both runs: one in which nothing happens, one with the kills.
"""

import asyncio
import dataclasses
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from kills.outcome import faults_of_leftovers
from kills.processes import MARK, Marked, kill
from model_families import TEXTS
from tiny_models import build_servable, write_prompts

from rlhf_ray.cluster.session import ray_session
from rlhf_ray.config import Config, resolve
from rlhf_ray.roles import Roles
from rlhf_ray.stages.ppo import stage as ppo

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]

ITERATIONS, BATCH_SIZE = 3, 8
KILLS = {
    ("scorer", "score", 1): "reward-0",
    ("reference", "logprobs", 2): "reference-0",
    ("critic", "values", 3): "critic-0",
    ("policy", "learn", 2): "policy-1",
}
"""Role, method and number of the call during which a process is killed -> its name."""
VARIES = ("timing_s/", "throughput/", "generators/", "perf/")
"""Metrics that are of the clock."""


def make_config(folder: Path, name: str, model: str, prompts: Path) -> Config:
    reward = folder / "reward.py"
    reward.write_text(
        "def even(prompts, completions, **columns):\n"
        "    return [sum(ord(c) % 2 == 0 for c in t) / (len(t) + 1) for t in completions]\n",
        encoding="utf-8",
    )
    return resolve(
        {
            "run": {"dir": str(folder / name), "name": name, "stages": ["ppo"]},
            "cluster": {"mode": "local", "dashboard": False},
            "model": {"path": model, "max_length": 96},
            "sft": {"path": model},
            "critic": {"init": "sft", "learning_rate": 1e-3},
            "data": {"prompts": {"path": str(prompts)}},
            "lora": {"r": 4},
            "policy": {"num_ranks": 2},
            "reference": {"kind": "own"},
            "rewards": [{"type": "function", "function": f"{reward}:even"}],
            "rollout": {
                "engine": "transformers",
                "max_prompt_tokens": 32,
                "max_tokens": 8,
                "shard_size": 4,
            },
            "ppo": {
                "iterations": ITERATIONS,
                "batch_size": BATCH_SIZE,
                "mini_batch_size": 4,
                "learning_rate": 1e-3,
                "eval_prompts": 8,
                "eval_every": 100,
            },
        }
    )


class Fatal:
    """A role during whose calls processes are killed."""

    def __init__(self, name: str, role: Any, marked: Marked, killed: list[str]) -> None:
        self._name, self._role, self._marked, self._killed = name, role, marked, killed
        self._calls: Counter[str] = Counter()

    def __getattr__(self, method: str) -> Callable[..., Any]:
        async def call(*args: Any) -> Any:
            self._calls[method] += 1
            victim = KILLS.get((self._name, method, self._calls[method]))
            answer = asyncio.ensure_future(getattr(self._role, method)(*args))
            if victim:
                await asyncio.sleep(0.02)
                seen = self._marked.refresh().values()
                self._marked.read_shared_memory()
                kill(next(process for process in seen if process.name == victim))
                self._killed.append(victim)
            return await answer

        return call


def run(
    config: Config, marked: Marked | None
) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """Run the stage ppo; returns its summary, its metrics, and who was killed.

    Args:
        config: of the run.
        marked: its processes; None: none is killed.
    """
    killed: list[str] = []
    original = ppo.ppo_roles

    @asynccontextmanager
    async def fatal_roles(*args: Any) -> AsyncIterator[Roles]:
        async with original(*args) as roles:
            names = ("scorer", "reference", "policy", "critic")
            fatal: Any = {
                name: Fatal(name, getattr(roles, name), marked, killed) for name in names if marked
            }
            yield dataclasses.replace(roles, **fatal)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "ppo_roles", fatal_roles)
        began_s = time.monotonic()
        summary: Any = ppo.run(config)
        print(f"{config.run.name}: {time.monotonic() - began_s:.1f} s")
    folder = Path(config.run.dir or "") / "ppo"
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return summary, [json.loads(line) for line in lines], killed


def adapter(config: Config, group: str) -> bytes:
    latest = Path(config.run.dir or "") / "checkpoints" / "latest"
    return (latest / group / "learner.safetensors").read_bytes()


def test_a_run_outlives_its_roles_and_learns_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked = Marked()
    monkeypatch.setenv(MARK, marked.mark)
    model = build_servable(tmp_path / "model", TEXTS)
    prompts = write_prompts(tmp_path / "prompts.jsonl", TEXTS)
    calm, killed = (make_config(tmp_path, name, model, prompts) for name in ("calm", "killed"))
    with ray_session(calm):
        _, undisturbed, _ = run(calm, None)
        summary, records, dead = run(killed, marked)
    assert not list(faults_of_leftovers(marked))
    assert sorted(dead) == sorted(KILLS.values())
    assert summary["iterations"] == summary["adapter_version"] == ITERATIONS
    assert summary["samples_generated"] == summary["samples_learnt"] == ITERATIONS * BATCH_SIZE
    for record, expected in zip(records, undisturbed, strict=True):
        for name, value in expected.items():
            if not name.startswith(VARIES):
                assert record[name] == value, f"iteration {record['iteration']}: {name}"
    for group in ("policy", "critic"):
        assert adapter(killed, group) == adapter(calm, group), f"the {group} learnt otherwise"
    outages = (tmp_path / "killed" / "ppo" / "outages.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in outages.splitlines()]
    restarts = Counter(record["role"] for record in found if record["restarts"])
    assert restarts == {"reward": 1, "reference": 1, "critic": 1, "policy": 1}
