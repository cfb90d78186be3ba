"""Who carries out the roles of a PPO run: actors in Ray, or objects in this process."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import torch

from actors.critic_learner import CriticLearner
from actors.generator import Generator
from actors.policy_learner import PolicyLearner
from actors.reference import Reference
from actors.reward_scorer import RewardScorer
from rlhf_ray.cluster.ray_session import runs_on_ray
from rlhf_ray.cluster.ray_workers import RayWorker, fetch, kill, spawn
from rlhf_ray.cluster.role_clients import (
    CriticClient,
    GeneratorClient,
    GeneratorPool,
    PolicyBaseClient,
    PolicyClient,
    ReferenceClient,
    ScorerClient,
)
from rlhf_ray.cluster.workers import InlineWorker, OnCall, Worker
from rlhf_ray.config import Config
from rlhf_ray.config.rewards import ClassifierSourceConfig, ModelSourceConfig
from rlhf_ray.driver.ppo_loop import Roles
from rlhf_ray.engines.factory import generation_engine
from rlhf_ray.engines.scoring import reward_sources
from rlhf_ray.errors import ActorFailure
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.models.stopping import stop_token_ids
from rlhf_ray.stages.run_folder import located

ASYNC_CONCURRENCY = 32
"""Calls that a role whose methods are async works on at a time."""

RUN_MODELS = (ModelSourceConfig, ClassifierSourceConfig)
"""Sources that compute in the scorer's own process, and want a GPU there."""


class RoleSpawner:
    """Starts role classes where the config says, and ends them."""

    def __init__(self, config: Config, on_call: OnCall) -> None:
        self._config = config
        self._on_call = on_call
        self._on_ray = runs_on_ray(config)
        self.workers: list[Worker] = []

    @property
    def learner_engine(self) -> str:
        """DeepSpeed where ranks are processes; plain PyTorch in this one."""
        return "deepspeed" if self._on_ray else "torch"

    def spawn(
        self, role_class: type, role: str, count: int, *args: Any, num_gpus: int = 1
    ) -> list[Worker]:
        """Workers ``role-0`` to ``role-<count - 1>``, not started; GPUs where there are any."""
        workers = [
            self._spawn_one(role_class, f"{role}-{i}", *args, num_gpus=num_gpus)
            for i in range(count)
        ]
        self.workers.extend(workers)
        return workers

    def _spawn_one(self, role_class: type, name: str, *args: Any, num_gpus: int) -> Worker:
        if not self._on_ray:
            return InlineWorker(name, role_class(name, *args), self._on_call)
        share = self._config.cluster.gpus_per_actor
        return spawn(
            role_class,
            name,
            *args,
            num_cpus=1,
            num_gpus=num_gpus * share if torch.cuda.is_available() else 0,
            concurrency=ASYNC_CONCURRENCY if role_class in (Generator, RewardScorer) else 1,
            timeout_s=self._config.cluster.call_timeout_s,
            on_call=self._on_call,
        )

    async def start_all(self, groups: Sequence[Sequence[Worker]]) -> None:
        """Start every worker at once; those of a learner group meet at their first rank.

        Raises:
            ActorFailure: not all were ready before cluster.start_timeout_s.
        """
        in_groups = {worker.name for group in groups for worker in group}
        alone = [worker for worker in self.workers if worker.name not in in_groups]
        deadline = self._config.cluster.start_timeout_s
        starts = [*(worker.call("start") for worker in alone), *map(_start_group, groups)]
        try:
            await asyncio.wait_for(asyncio.gather(*starts), deadline)
        except TimeoutError:
            raise ActorFailure(
                f"Not every role was ready within {deadline:g} s (cluster.start_timeout_s): "
                f"{', '.join(worker.name for worker in self.workers)}"
            ) from None

    async def stop_all(self) -> None:
        """Let generators end their engines, then end every actor."""
        generators = [w for w in self.workers if w.name.startswith("generator")]
        await asyncio.gather(*(w.call("stop") for w in generators), return_exceptions=True)
        kill([worker for worker in self.workers if isinstance(worker, RayWorker)])

    def num_gpus(self) -> float:
        """GPUs that its actors hold."""
        return sum(worker.num_gpus for worker in self.workers if isinstance(worker, RayWorker))

    async def fetch(self, handle: Any) -> Any:
        """Bring data to the driver."""
        return await fetch(handle) if self._on_ray else handle


async def _start_group(ranks: Sequence[Worker]) -> None:
    address, port = await ranks[0].address(), await ranks[0].call("free_port")
    await asyncio.gather(
        *(
            worker.call("start", rank, len(ranks), address, port)
            for rank, worker in enumerate(ranks)
        )
    )


def spawn_generators(spawner: RoleSpawner, config: Config, base: str) -> GeneratorPool:
    """Generators over a base model, not started."""
    stop = stop_token_ids(base, config.template)
    workers = spawner.spawn(
        Generator,
        "generator",
        config.generators.num,
        partial(generation_engine, config, base, stop),
        partial(load_tokenizer, base),
        num_gpus=config.generators.tensor_parallel_size,
    )
    clients = [GeneratorClient(worker) for worker in workers]
    return GeneratorPool(clients, config.generators.max_in_flight)


def spawn_scorers(
    spawner: RoleSpawner, config: Config, reward_model: str | None, policy_model: str
) -> ScorerClient:
    """Scorers with all sources of rewards, not started."""
    sources = [located(source) for source in config.rewards]
    config = config.model_copy(update={"rewards": sources})
    workers = spawner.spawn(
        RewardScorer,
        "reward",
        config.reward.num_workers,
        sources,
        partial(reward_sources, config, reward_model, policy_model),
        num_gpus=int(any(isinstance(source, RUN_MODELS) for source in sources)),
    )
    return ScorerClient(workers)


@asynccontextmanager
async def ppo_roles(
    config: Config,
    policy_model: str,
    reward_model: str | None,
    critic_model: str | None,
    on_call: OnCall,
) -> AsyncIterator[Roles]:
    """Every role that the config needs, ready to work; ended on the way out."""
    spawner = RoleSpawner(config, on_call)
    engine = spawner.learner_engine
    generators = spawn_generators(spawner, config, policy_model)
    scorer = spawn_scorers(spawner, config, reward_model, policy_model)
    references = spawner.spawn(
        Reference, "reference", config.reference.num_processes, config, policy_model
    )
    policy = spawner.spawn(
        PolicyLearner, "policy", config.policy.num_ranks, config, policy_model, engine
    )
    num_critics = config.critic.num_ranks if critic_model else 0
    critic = spawner.spawn(CriticLearner, "critic", num_critics, config, critic_model, engine)
    try:
        await spawner.start_all([group for group in (policy, critic) if group])
        policy_client = PolicyClient(policy, config.policy.zero_stage)
        yield Roles(
            generators=generators,
            scorer=scorer,
            reference=ReferenceClient(references)
            if references
            else PolicyBaseClient(policy_client),
            policy=policy_client,
            critic=CriticClient(critic, config.critic.zero_stage) if critic else None,
            fetch=spawner.fetch,
            num_gpus=spawner.num_gpus,
        )
    finally:
        await spawner.stop_all()
