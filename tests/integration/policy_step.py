"""One PPO policy step in a process of its own, and its peak memory.

A module of its own, because what is measured is a process: run with a model folder and config
files, it prints a line of JSON for each, from processes that have their libraries imported.
"""

import json
import multiprocessing
import sys
from pathlib import Path

import numpy as np

from actors.policy_learner import PolicyLearner
from rlhf_ray.config import Config, load
from rlhf_ray.observability.repeated import repeated
from rlhf_ray.types import Prompt, Rollout

INTERVAL_S = 0.002
"""Seconds between two looks at the process."""


def resident() -> int:
    """Bytes of this process that are in memory: mapped files count, as weights are read so."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line for line in status.splitlines() if "VmRSS" in line).split()[1])


class Peak:
    """The most that a process comes to while something runs."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def look(self) -> None:
        """Return the memory in use now."""
        self.num_bytes = max(self.num_bytes, resident())


def longest_rollouts(config: Config) -> list[Rollout]:
    """A batch of prompts and responses at their limits."""
    limits, random = config.rollout, np.random.default_rng(0)
    return [
        Rollout(
            position=position,
            prompt=Prompt(
                id=str(position),
                text="",
                token_ids=tuple(random.integers(3, 250, limits.max_prompt_tokens).tolist()),
            ),
            response_ids=random.integers(3, 250, limits.max_tokens),
            rollout_logprobs=np.zeros(limits.max_tokens, np.float32),
            finish_reason="length",
            version=0,
            text="",
        )
        for position in range(config.ppo.batch_size)
    ]


def step(config: Config, model: str) -> dict[str, int]:
    """Bytes of the idle process, of the loaded learner, and at the peak of a step."""
    learner = PolicyLearner("policy-0", config, model, "deepspeed")
    idle = resident()
    learner.start(0, 1, "127.0.0.1", learner.free_port())
    loaded = resident()
    rollouts = longest_rollouts(config)
    old, _ = learner.logprobs(rollouts)
    scores = [tuple(float(rollout.position % 2) for rollout in rollouts)]
    learner.assemble(0.2, scores, rollouts, old, old, old)
    peak = Peak()
    with repeated(peak.look, INTERVAL_S, "memory"):
        learner.learn(0.0, 1.0)
    return {"idle": idle, "loaded": loaded, "peak": peak.num_bytes}


def main(model: str, *config_files: str) -> None:
    """Take a step for each config, one after the other."""
    import deepspeed  # noqa: F401  (the idle actor has its libraries imported)

    for file in config_files:
        process = multiprocessing.get_context("fork").Process(
            target=lambda file=file: print(json.dumps(step(load(file), model)), flush=True)
        )
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{file}: {process.exitcode}")


if __name__ == "__main__":
    main(*sys.argv[1:])
