"""Spawns the roles of a PPO run: actors in Ray, or objects in this process (inline)."""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from actors.critic_learner import CriticLearner
from actors.policy_learner import PolicyLearner
from actors.reference import Reference
from actors.reward_scorer import RewardScorer
from rlhf_ray.cluster.learner_groups import CriticClient, PolicyBaseClient, PolicyClient
from rlhf_ray.cluster.role_clients import Crew, GeneratorClient, ReferenceClient, ScorerClient
from rlhf_ray.cluster.spawner import RoleSpawner
from rlhf_ray.cluster.workers import fetch
from rlhf_ray.config import Config
from rlhf_ray.driver.recorder import Recorder
from rlhf_ray.engines.scoring import reward_sources
from rlhf_ray.generators.member import cancel
from rlhf_ray.generators.pool import GeneratorPool
from rlhf_ray.placement.idle_actors import needs_no_slots
from rlhf_ray.placement.layout import demands
from rlhf_ray.roles import Roles
from rlhf_ray.runs.folder import located
from rlhf_ray.stages.ppo.drains import drains_followed
from rlhf_ray.stages.ppo.generators import spawn_generators


def spawn_scorers(
    spawner: RoleSpawner, config: Config, reward_model: str | None, policy_model: str
) -> ScorerClient:
    """Make the scorers, with all reward sources; they are not started."""
    sources = [located(source) for source in config.rewards]
    config = config.model_copy(update={"rewards": sources})
    crew = spawner.spawn_crew(
        RewardScorer,
        "reward",
        config.reward.num_workers,
        sources,
        partial(reward_sources, config, reward_model, policy_model),
        config.cluster.source_timeout_s,
    )
    return ScorerClient(crew)


@asynccontextmanager
async def ppo_roles(
    config: Config,
    policy_model: str,
    reward_model: str | None,
    critic_model: str | None,
    recorder: Recorder,
    say: Callable[[str], None],
) -> AsyncIterator[Roles]:
    """Start every role that the config needs; end them on the way out."""
    spawner = RoleSpawner(config, recorder.span, recorder.outages, say)
    needed = [demand for demand in demands(config) if demand.role != "critic" or critic_model]
    async with AsyncExitStack() as stack:
        stack.push_async_callback(spawner.stop_all)
        if "evaluate" in config.run.stages:
            stack.callback(spawner.leave, _names(config, ("generator", "reward")))
        await spawner.place(needed)
        spawned = _spawn(spawner, config, policy_model, reward_model, critic_model, say)
        generators, scorer, references, policy, critic = spawned
        stack.push_async_callback(generators.close)
        groups = {"policy": policy} | ({"critic": critic} if critic else {})
        await stack.enter_async_context(drains_followed(spawner, groups, say))
        starts = asyncio.ensure_future(generators.start())
        stack.push_async_callback(cancel, [starts])  # where another role does not start
        await asyncio.gather(spawner.start_all([policy, critic] if critic else [policy]), starts)
        yield Roles(
            generators=generators,
            scorer=scorer,
            # Without reference processes the policy's own base answers, its adapter switched off.
            reference=(
                ReferenceClient(references)
                if config.reference.num_processes
                else PolicyBaseClient(policy)
            ),
            policy=policy,
            critic=critic,
            fetch=fetch,
            num_gpus=spawner.num_gpus,
            peak_memory=spawner.peak_memory,
        )


def begin_roles(
    config: Config, policy_model: str, reward_model: str | None, critic_model: str | None
) -> None:
    """Start the roles' processes before their stage: they import, generators load their base.

    The stage goes on with them, where it needs no slots. The models of rewards and critic need not
    exist yet.
    """
    if needs_no_slots(config):
        spawner = RoleSpawner(config, lambda *_: None)
        _spawn(spawner, config, policy_model, reward_model, critic_model, lambda _: None)
        spawner.leave([worker.name for worker in spawner.workers])


def _names(config: Config, roles: Collection[str]) -> list[str]:
    """Return the workers with which a stage begins in some roles."""
    known = [demand for demand in demands(config) if demand.role in roles]
    return [f"{demand.role}-{rank}" for demand in known for rank in range(demand.workers)]


Spawned = tuple[
    GeneratorPool[GeneratorClient],
    ScorerClient,
    Crew[Reference],
    PolicyClient,
    CriticClient | None,
]


def _spawn(
    spawner: RoleSpawner,
    config: Config,
    policy_model: str,
    reward_model: str | None,
    critic_model: str | None,
    say: Callable[[str], None],
) -> Spawned:
    """Make every role that the config needs, not started."""
    return (
        spawn_generators(spawner, config, policy_model, say, config.rollout.autoscale),
        spawn_scorers(spawner, config, reward_model, policy_model),
        spawner.spawn_crew(
            Reference, "reference", config.reference.num_processes, config, policy_model
        ),
        _policy(spawner, config, policy_model),
        _critic(spawner, config, critic_model) if critic_model else None,
    )


def _policy(spawner: RoleSpawner, config: Config, model: str) -> PolicyClient:
    settings, engine = config.policy, spawner.learner_engine
    ranks = spawner.spawn(PolicyLearner, "policy", settings.num_ranks, config, model, engine)
    return PolicyClient(ranks, settings.zero_stage, spawner.group_restarts)


def _critic(spawner: RoleSpawner, config: Config, model: str) -> CriticClient:
    settings, engine = config.critic, spawner.learner_engine
    ranks = spawner.spawn(CriticLearner, "critic", settings.num_ranks, config, model, engine)
    return CriticClient(ranks, settings.zero_stage, spawner.group_restarts)
