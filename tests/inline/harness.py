"""A real PpoLoop over fake roles, in a folder."""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fakes import Events, FakeCritic, FakePolicy, FakeReference, FakeScorer, Tokenizer

from actors.generator import Generator
from rlhf_ray.cluster.role_clients import GeneratorClient
from rlhf_ray.cluster.workers import InlineWorker
from rlhf_ray.config import Config, resolve
from rlhf_ray.driver.batches import PromptCursor
from rlhf_ray.driver.checkpoint import Checkpoints, RunState, SavedCommit
from rlhf_ray.driver.evaluation import Evaluator
from rlhf_ray.driver.ppo_loop import LoopParts, PpoLoop
from rlhf_ray.driver.recorder import Recorder
from rlhf_ray.driver.weight_sync import WeightSync, probe_requests, publish_to
from rlhf_ray.engines.fake import FakeEngine
from rlhf_ray.generators.pool import GeneratorPool
from rlhf_ray.observability.progress import Bar
from rlhf_ray.observability.tracing import Tracer
from rlhf_ray.roles import Roles
from rlhf_ray.types import (
    AdapterUpdate,
    Prompt,
    ServedAdapter,
    Shard,
    ShardRequest,
)

PROMPTS = [Prompt(f"p{i}", f"prompt {i}", (i + 1, i + 2, i + 3)) for i in range(10)]


class SpyGenerator(GeneratorClient):
    """A generator that tells what it was asked for."""

    def __init__(self, worker: InlineWorker, events: Events) -> None:
        super().__init__(worker)
        self._events = events

    async def generate(self, request: ShardRequest) -> Shard:
        self._events.append(("generate", (request.version, request.index)))
        shard = await super().generate(request)
        self._events.append(("generated", (request.version, request.index)))
        return shard

    async def publish(self, update: AdapterUpdate) -> ServedAdapter:
        self._events.append(("publish", update.version))
        return await super().publish(update)


async def _no_peaks() -> dict[str, int]:
    return {}


class Processes:
    """Starts generators over fake engines; `engines` makes that of each new one."""

    def __init__(self, events: Events, engines: Callable[[], FakeEngine] = FakeEngine) -> None:
        self.num_wanted = 0
        self._events = events
        self.engines = engines

    async def start(self, name: str) -> SpyGenerator:
        return await self.over(self.engines(), name)

    async def over(self, engine: FakeEngine, name: str) -> SpyGenerator:
        generator = Generator(name, lambda: engine, Tokenizer)
        self._events.append(("start", name))
        await generator.start()
        return SpyGenerator(InlineWorker(name, generator, lambda *_: None), self._events)

    async def end(self, generator: GeneratorClient) -> None:
        self._events.append(("end", generator.name))

    def request_capacity(self, num: int) -> None:
        self.num_wanted = num


def ledger(
    learnt: int, discarded: int = 0, filtered: int = 0, in_flight: int = 0
) -> dict[str, int]:
    """A summary's ledger that adds up."""
    return {
        "drawn": learnt + discarded + filtered + in_flight,
        "learnt": learnt,
        "discarded": discarded,
        "filtered": filtered,
        "in_flight": in_flight,
    }


def make_config(
    folder: Path,
    guards: dict[str, Any] | None = None,
    max_restarts: int = 0,
    shard_size: int = 3,
    **ppo: Any,
) -> Config:
    """A run of six iterations of eight rollouts, two of a prompt, in shards of three."""
    values = {
        "run": {"dir": str(folder)},
        "cluster": {"mode": "inline"},
        "rollout": {
            "engine": "transformers",
            "shard_size": shard_size,
            "max_prompt_tokens": 8,
            "max_tokens": 8,
        },
        "ppo": {
            "iterations": 6,
            "batch_size": 8,
            "mini_batch_size": 8,
            "samples_per_prompt": 2,
            "save_every": 2,
            "eval_every": 3,
            "eval_prompts": 8,
            "kl_target": 0.5,
            "kl_horizon": 80,
            **ppo,
        },
        "guards": guards or {},
        "generators": {"max_in_flight": 2, "max_restarts": max_restarts},
    }
    return resolve(values)


class Harness:
    """A real PpoLoop over fakes, in a folder; made anew, it goes on from the folder's commit."""

    def __init__(
        self,
        config: Config,
        engines: Sequence[FakeEngine] = (),
        policy: FakePolicy | None = None,
        pool: type[GeneratorPool] = GeneratorPool,
        scorer: type[FakeScorer] = FakeScorer,
    ) -> None:
        self.config = config
        self.folder = Path(config.run.dir)
        self.events: Events = []
        self.engines = list(engines) or [FakeEngine()]
        self.policy = policy or FakePolicy()
        self.critic = FakeCritic(self.events)
        self.policy.events = self.events
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints", config.ppo.keep_checkpoints, {"policy": {}}
        )
        self.told: list[str] = []
        """Lines about generators."""
        self.processes = Processes(self.events)
        self._pool = pool
        self._scorer = scorer

    def run(self) -> dict[str, Any]:
        return asyncio.run(self._run())

    async def _run(self) -> dict[str, Any]:
        config, saved = self.config, self.checkpoints.latest()
        state = RunState(**saved.progress) if saved else RunState()
        tracer = Tracer(self.folder / "trace.json")
        recorder = Recorder(
            self.folder / "ppo",
            tracer,
            config.trackers,
            state.iteration if saved else None,
            sources=[source.name for source in config.rewards],
        )
        await self._restore(saved)
        parts = LoopParts(
            config=config,
            roles=await self._roles(),
            cursor=PromptCursor(PROMPTS[:8], config.run.seed),
            sync=WeightSync(self.policy, probe_requests(PROMPTS, 8, 0), config.engine_is_exact),
            evaluator=Evaluator(
                PROMPTS[8:], config.rewards, config.rollout.shard_size, config.run.seed
            ),
            checkpoints=self.checkpoints,
            recorder=recorder,
            state=state,
            bar=Bar("ppo", config.ppo.iterations, "iteration", 0, lambda: 0.0),
        )
        self.loop = PpoLoop(parts)
        self.task = asyncio.current_task()
        try:
            return await self.loop.run()
        finally:
            await self.generators.close()
            recorder.close()
            tracer.close()

    async def _restore(self, saved: SavedCommit | None) -> None:
        if saved:
            await self.policy.load(saved.policy)
            await self.critic.load(saved.critic)

    async def _roles(self) -> Roles:
        members = [
            await self.processes.over(engine, f"generator-{number}")
            for number, engine in enumerate(self.engines)
        ]
        settings = self.config.generators
        self.generators = self._pool(
            members, self.processes, publish_to, settings, first_wait_s=0.0, say=self.told.append
        )
        return Roles(
            generators=self.generators,
            scorer=self._scorer(self.events),
            reference=FakeReference(),
            policy=self.policy,
            critic=self.critic,
            fetch=_fetch,
            num_gpus=lambda: 4.0,
            peak_memory=_no_peaks,
        )

    def metrics(self) -> list[dict[str, Any]]:
        """Every iteration's metrics without times, which never repeat."""
        return [
            {
                k: v
                for k, v in record.items()
                if not k.startswith(("timing_s/", "throughput/", "generators/"))
            }
            for record in self.records("metrics")
        ]

    def records(self, name: str) -> list[dict[str, Any]]:
        """Lines of a JSON lines file of the stage."""
        path = self.folder / "ppo" / f"{name}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def saved(self) -> list[int]:
        """Versions in the folder."""
        return sorted(int(p.name) for p in (self.folder / "checkpoints").glob("[0-9]*"))


def stale(shard: Shard, version: int) -> Shard:
    """The shard, as if another version had sampled its first rollout."""
    return replace(shard, info=replace(shard.info, versions=(version, *shard.info.versions[1:])))


def stop_at_third(harness: Harness) -> None:
    """Have a run asked to stop while its third batch is learnt."""
    policy, learn = harness.policy, harness.policy.learn

    async def learn_or_stop(*args: float) -> Any:
        if policy.learnt == 2:
            harness.loop.request_stop()
        return await learn(*args)

    policy.learn = learn_or_stop  # type: ignore[method-assign]


async def _fetch(handle: Any) -> Any:
    return handle
