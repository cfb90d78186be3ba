"""The PPO loop over roles that compute nothing: they answer at once, or after set times."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_ray.config import Config, resolve
from rlhf_ray.driver.batches import PromptCursor
from rlhf_ray.driver.checkpoint import Checkpoints, RunState
from rlhf_ray.driver.evaluation import Evaluator
from rlhf_ray.driver.ppo_loop import LoopParts, PpoLoop
from rlhf_ray.driver.recorder import Recorder
from rlhf_ray.driver.weight_sync import WeightSync, probe_requests, publish_to
from rlhf_ray.generators.pool import GeneratorPool
from rlhf_ray.observability.progress import Bar
from rlhf_ray.observability.tracing import Tracer
from rlhf_ray.roles import Roles
from rlhf_ray.types import (
    AdapterUpdate,
    AssembledStats,
    Mismatch,
    ProbeComparison,
    Prompt,
    Rollout,
    SampleRequest,
    ScoredShard,
    ServedAdapter,
    Shard,
    ShardInfo,
    ShardRequest,
    StepReport,
)

LENGTH = 32
"""Tokens of each response."""


@dataclass
class Times:
    """How long roles work."""

    of_position_s: Mapping[int, float] = field(default_factory=dict[int, float])
    """Position -> seconds of its response; a shard takes as long as its longest. Empty: none."""
    learn_s: float = 0.0
    """Seconds in which a batch is learnt."""
    generating_s: list[float] = field(default_factory=list[float])
    """Seconds of each shard so far."""


@dataclass(frozen=True)
class IdleGenerator:
    """Answers without sampling."""

    name: str
    times: Times

    async def generate(self, request: ShardRequest) -> Shard:
        """Return a shard of equal responses; its handle is the request."""
        if of_position_s := self.times.of_position_s:
            seconds = max(of_position_s[sample.position] for sample in request.samples)
            await asyncio.sleep(seconds)
            self.times.generating_s.append(seconds)
        count = len(request.samples)
        info = ShardInfo(
            index=request.index,
            positions=tuple(sample.position for sample in request.samples),
            response_lengths=(LENGTH,) * count,
            stopped=(True,) * count,
            versions=(request.version,) * count,
            repeating=(False,) * count,
            distinct_bigrams=(1.0,) * count,
        )
        return Shard(info, request, self.name)  # type: ignore[arg-type]

    async def publish(self, update: AdapterUpdate) -> ServedAdapter:
        """Report what was sent."""
        return ServedAdapter(update.version, 1, update.digest, True, 0.0)


@dataclass
class NoProcesses:
    """The factory of a pool that starts and ends nothing."""

    times: Times

    async def start(self, name: str) -> IdleGenerator:
        return IdleGenerator(name, self.times)

    async def load(self, generator: IdleGenerator) -> None:
        pass

    async def end(self, generator: IdleGenerator) -> None:
        pass

    def request_capacity(self, num: int) -> None:
        pass


class IdleScorer:
    """Scores by position alone."""

    async def score(self, shard: Shard) -> dict[str, tuple[float, ...]]:
        return {"model": tuple(float(position % 7) for position in shard.info.positions)}


def _zeros(shard: Shard) -> Any:
    """Return a zero for each token; the handle of values is the values."""
    return [np.zeros(LENGTH, np.float32)] * len(shard.info.positions)


class IdleReference:
    """Finds every token certain."""

    async def logprobs(self, shard: Shard) -> Any:
        return _zeros(shard)


@dataclass
class IdleLearners:
    """Policy and critic in one: both report what the driver checks."""

    times: Times
    positions: tuple[int, ...] = ()

    async def logprobs(self, shard: Shard) -> tuple[Any, Mismatch]:
        tokens = sum(shard.info.response_lengths)
        return _zeros(shard), Mismatch(1e-7, 1e-6, tokens)

    async def values(self, shard: Shard) -> Any:
        return _zeros(shard)

    async def sample_kl(self, shard: Shard, ref_logprobs: Any) -> tuple[float, ...]:
        return (0.0,) * len(shard.info.positions)

    async def assemble(self, batch: Sequence[ScoredShard], kl_coef: float) -> AssembledStats:
        self.positions = tuple(p for scored in batch for p in scored.shard.info.positions)
        count = len(self.positions)
        return AssembledStats(count, LENGTH * count, 0.0, float(LENGTH * count), 0.1, 1.0, 1.0)

    async def learn(
        self, advantage_mean: float, advantage_std: float, iteration: int
    ) -> StepReport:
        if self.times.learn_s:
            await asyncio.sleep(self.times.learn_s)
        metrics = {"loss/policy_avg": 0.1, "policy/grad_norm": 1.0, "policy/approxkl_avg": 1e-3}
        return StepReport(metrics, self.positions, LENGTH * len(self.positions))

    async def state(self) -> dict[str, bytes]:
        return {"adapter_model.safetensors": b"0" * 4096, "adapter_config.json": b"{}"}

    async def load(self, state: Any) -> None:
        pass

    async def adapter(self, version: int) -> AdapterUpdate:
        return AdapterUpdate(version, f"{version:x}", {"r": 1}, b"")

    async def zero_adapter(self, version: int) -> AdapterUpdate:
        return await self.adapter(version)

    async def probe(self, version: int, prompts: Sequence[SampleRequest]) -> AdapterUpdate:
        return await self.adapter(version)

    async def compare(self, update: AdapterUpdate, shard: Shard) -> ProbeComparison:
        return ProbeComparison(1.0, 1.0, 0.0, 0.0)


async def _fetch(handle: Any) -> Any:
    """Return the rollouts of a shard, whose handle is its request."""
    if not isinstance(handle, ShardRequest):
        return handle
    zeros = np.zeros(LENGTH, np.float32)
    ids = np.arange(LENGTH)
    return [
        Rollout(each.position, each.prompt, ids, zeros, "stop", handle.version, "an answer")
        for each in handle.samples
    ]


async def _no_peaks() -> dict[str, int]:
    return {}


class Ticks(Bar):
    """Notes when each iteration was recorded."""

    def __init__(self, iterations: int) -> None:
        super().__init__("ppo", iterations, "iteration", 0, time.monotonic)
        self.at_s: list[float] = []

    def advance(self, num_units: int = 1, **values: float) -> None:
        self.at_s.append(time.perf_counter())

    def seconds(self, first: int) -> list[float]:
        """Return the length of each iteration from the one numbered ``first`` on."""
        return [end - start for start, end in pairwise(self.at_s[first - 1 :])]


@dataclass
class IdleRun:
    """A run of the loop over idle roles."""

    folder: Path
    iterations: int
    num_samples: int
    num_generators: int
    eval_every: int = 10**9
    max_staleness: int = 0
    times: Times = field(default_factory=Times)
    shard_size: int = 8
    max_in_flight: int = 8
    bar: Ticks = field(init=False)

    def __post_init__(self) -> None:
        self.bar = Ticks(self.iterations)

    def config(self) -> Config:
        """Return the run's config: defaults but for its size."""
        return resolve(
            {
                "run": {"dir": str(self.folder), "keep_batches": "none"},
                "cluster": {"mode": "inline"},
                "rollout": {
                    "engine": "transformers",
                    "max_prompt_tokens": 8,
                    "shard_size": self.shard_size,
                },
                "generators": {"max_in_flight": self.max_in_flight},
                "ppo": {
                    "iterations": self.iterations,
                    "batch_size": self.num_samples,
                    "mini_batch_size": self.num_samples,
                    "save_every": 10**9,
                    "eval_every": self.eval_every,
                    "max_staleness": self.max_staleness,
                    "allow_uncorrected": True,
                },
            }
        )

    async def run(self) -> dict[str, Any]:
        """Run the loop to its end; return its summary."""
        config = self.config()
        numbers = range(self.num_samples)
        prompts = [Prompt(f"p{i}", f"prompt {i}", (i % 50, 1, 2, 3)) for i in numbers]
        first = [
            IdleGenerator(f"generator-{number}", self.times)
            for number in range(self.num_generators)
        ]
        pool = GeneratorPool(first, NoProcesses(self.times), publish_to, config.generators)
        learners = IdleLearners(self.times)
        roles = Roles(
            generators=pool,
            scorer=IdleScorer(),
            reference=IdleReference(),
            policy=learners,
            critic=IdleLearners(self.times),  # type: ignore[arg-type]
            fetch=_fetch,
            num_gpus=lambda: 0.0,
            peak_memory=_no_peaks,
        )
        tracer = Tracer(self.folder / "trace.json")
        recorder = Recorder(self.folder / "ppo", tracer, config.trackers, None)
        parts = LoopParts(
            config=config,
            roles=roles,
            cursor=PromptCursor(prompts, config.run.seed),
            sync=WeightSync(learners, probe_requests(prompts, 8, 0), config.engine_is_exact),
            evaluator=Evaluator(prompts[:8], config.rewards, 8, config.run.seed),
            checkpoints=Checkpoints(self.folder / "checkpoints", 2, {}),
            recorder=recorder,
            state=RunState(),
            bar=self.bar,
        )
        try:
            return await PpoLoop(parts).run()
        finally:
            await pool.close()
            recorder.close()
            tracer.close()
