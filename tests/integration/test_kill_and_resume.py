"""A rehearsed run; and the same run killed, and resumed by more processes.

A Qwen2.5-shaped policy and a reward model that has another tokenizer, over real Ray, vLLM and
DeepSpeed.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from sockets import reachable

from rlhf_ray.observability.sinks import read_jsonl

if TYPE_CHECKING:
    from conftest import CommandLine

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(590)]

ITERATIONS = 3
CONFIG = """
run: {{name: mine, stages: [ppo]}}
cluster: {{dashboard: false}}
model: {{path: {qwen}, max_length: 96}}
reward: {{path: {reward_model}}}
data: {{prompts: {{path: {prompts}}}}}
lora: {{r: 8}}
rewards:
  - {{type: model}}
  - {{type: function, name: mine, function: "{rewards}:of_length"}}
reference: {{kind: policy_base}}
ppo:
  iterations: {iterations}
  batch_size: 8
  mini_batch_size: 4
  epochs: 2
  learning_rate: 1.0e-3
  eval_every: 100
  eval_prompts: 8
critic: {{learning_rate: 1.0e-3}}
rollout: {{max_prompt_tokens: 64, max_tokens: 16, shard_size: 4}}
"""
REWARDS = """
import os, pathlib

def of_length(completions, **_):
    with pathlib.Path(__file__).with_name("asked").open("a") as asked:
        print(os.getpid(), file=asked)
    return [len(text) / 100 for text in completions]
"""
MORE = (
    *("policy.num_ranks=2", "critic.num_ranks=2"),
    "generators.tensor_parallel_size=2",
)
"""Each of the generator's workers has half of every layer, and proves its half of each adapter."""
TOGETHER = ("raylet", "ray::policy-1", "ray::critic-1", "ray::generator-0", "EngineCore")
"""Parts of the command lines of processes that a run has at once."""
VARIES = ("timing_s/", "throughput/", "generators/")
"""Metrics that are of the clock."""


@dataclass(frozen=True)
class Given:
    """What the runs have in common."""

    line: "CommandLine"
    folder: Path
    config: str

    def metrics(self, run: str) -> list[dict[str, Any]]:
        """Records of a run's iterations so far."""
        path = self.folder / run / "ppo" / "metrics.jsonl"
        return read_jsonl(path) if path.is_file() else []

    def summary(self, run: str) -> dict[str, Any]:
        """Summary of a run's PPO."""
        path = self.folder / run / "ppo" / "summary.json"
        return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def given(
    new_command_line: Callable[[Path, Path], "CommandLine"],
    tmp_path_factory: pytest.TempPathFactory,
    qwen: str,
    reward_model: str,
    prompts_file: Path,
) -> Iterator[Given]:
    folder = tmp_path_factory.mktemp("runs")
    rewards, config = folder / "rewards.py", folder / "config.yaml"
    rewards.write_text(REWARDS, encoding="utf-8")
    models = {"qwen": qwen, "reward_model": reward_model, "prompts": prompts_file}
    text = CONFIG.format(iterations=ITERATIONS, rewards=rewards, **models)
    config.write_text(text, encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="rlhf-", dir="/tmp") as temporary:
        line = new_command_line(folder, Path(temporary))
        try:
            yield Given(line, folder, str(config))
        finally:
            line.end()


@pytest.fixture(scope="module")
def whole(given: Given) -> set[str]:
    """A run to which nothing happens, after its rehearsal; returns who asked for rewards."""
    given.line.run("run", given.config, f"run.dir={given.folder / 'whole'}", "--rehearse")
    given.line.wait_until_nothing_left()
    return set((given.folder / "asked").read_text().split())


def test_two_iterations_at_the_worst_case_survive_the_loss_of_a_generator(
    given: Given, whole: set[str]
) -> None:
    run = given.folder / "whole"
    found = json.loads((run / "rehearsal.json").read_text())
    assert found["samples"] == 16
    assert found["generator_restarts"] == 1
    workers = {"policy-0", "critic-0", "reward-0", "generator-0"}
    assert workers <= set(found["peak_memory_bytes"])
    assert min(found["peak_memory_bytes"].values()) > 10**8  # Python with its libraries
    assert {"gen", "score", "learn", "commit", "sync", "save"} <= set(found["seconds"])
    records = read_jsonl(run / "rehearsal" / "ppo" / "metrics.jsonl")
    assert [record["response_length/mean"] for record in records] == [16, 16]
    evaluations = read_jsonl(run / "rehearsal" / "ppo" / "eval.jsonl")
    assert evaluations[-1]["iteration"] == 2

    assert len(whole) == 1, "the run's scorer alone asks"
    assert len(given.metrics("whole")) == ITERATIONS
    planned = given.line.run("plan", given.config, f"run.dir={run}")
    assert "seconds are from the rehearsal of" in planned
    given.line.wait_until_nothing_left()


def test_a_killed_run_goes_on_as_if_nothing_had_happened(given: Given, whole: set[str]) -> None:
    """On two ranks a group and two workers a generator, and on loopback alone."""
    line, killed = given.line, given.folder / "killed"
    process = line.start("run", given.config, f"run.dir={killed}")
    wait_for_commit(line, process, killed, version=1)
    process.kill()
    process.wait(10)
    saved = max(int(path.parent.name) for path in killed.glob("checkpoints/[0-9]*/state.json"))
    before = given.metrics("killed")[:saved]  # records may run ahead of the commit
    dead = {(left.pid, left.create_time()) for left in line.processes()}
    assert dead or line.shared_memory_files(), "nothing left: there is nothing to sweep"

    process = line.start("run", given.config, f"run.dir={killed}", *MORE, HF_HUB_OFFLINE="1")
    were_together = False
    while process.poll() is None:
        processes = [
            left for left in line.processes() if (left.pid, left.create_time()) not in dead
        ]
        assert not list(reachable(processes))
        seen = " ".join(map(shown, processes))
        were_together |= all(part in seen for part in TOGETHER)
        time.sleep(0.5)
    assert process.returncode == 0, line.output()
    assert were_together, "sockets of some process were never looked at"

    after = given.metrics("killed")
    assert [record["iteration"] for record in after] == [1, 2, 3]
    assert after[: len(before)] == before, "records of what was committed are as they were"
    for resumed, uninterrupted in zip(after, given.metrics("whole"), strict=True):
        for name, value in uninterrupted.items():
            if not name.startswith(VARIES):
                assert math.isclose(resumed[name], value, rel_tol=1e-4, abs_tol=1e-4), (
                    f"iteration {resumed['iteration']}: {name} {resumed[name]} against {value}"
                )
    assert all(record["sampler/gap_mean"] < 1e-4 for record in after)
    summary = given.summary("killed")
    assert summary["iterations"] == summary["adapter_version"] == ITERATIONS
    assert summary["samples_generated"] == summary["samples_learnt"] == 8 * ITERATIONS
    assert summary["samples_requeued"] == summary["generator_restarts"] == 0
    trace = (killed / "trace.json").read_text(encoding="utf-8")
    assert all(f'"{name}"' in trace for name in ("generator-0", "policy-1", "critic-1"))
    alive = {(left.pid, left.create_time()) for left in line.processes()}
    assert not dead & alive
    line.wait_until_nothing_left()


def wait_for_commit(line: "CommandLine", process: Any, run: Path, version: int) -> None:
    """Wait until a version is committed; poll far faster than the work after a commit takes."""
    deadline = time.monotonic() + 300
    while not (run / "checkpoints" / str(version) / "state.json").is_file():
        assert process.poll() is None, f"the run ended by itself:\n{line.output()}"
        assert time.monotonic() < deadline, f"no commit:\n{line.output()}"
        time.sleep(0.005)


def shown(process: psutil.Process) -> str:
    """Return the command line or title of a process; nothing of one that has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
