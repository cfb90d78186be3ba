"""Every compared model's answers to the same prompts under the same seeds, and its perplexity."""

import json
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.likelihood import Likelihood
from rlhf_ray.cluster.role_clients import ScorerClient
from rlhf_ray.config import Config
from rlhf_ray.driver.batches import sample_requests, shard_requests
from rlhf_ray.generators.pool import GeneratorPool
from rlhf_ray.models.adapters import digest, tensors_from_bytes
from rlhf_ray.models.folders import ADAPTER_CONFIG
from rlhf_ray.observability.progress import Bar
from rlhf_ray.placement.layout import Demand, demands
from rlhf_ray.rewards.combine import raw_sums
from rlhf_ray.stages.evaluate.models import WEIGHTS, AdapterFiles
from rlhf_ray.stages.ppo.generators import spawn_generators
from rlhf_ray.stages.ppo.roles import RoleSpawner, spawn_scorers
from rlhf_ray.types import AdapterUpdate, Prompt, Rollout, SampleRequest, Shard

Sample = dict[str, Any]
"""A held-out prompt and an answer to it: position, prompt, text, reward; other scores are added."""

SAMPLES_PER_INSTRUCTION = 4
ANSWERS_AT_ONCE = 64
"""Given answers of one call: a call has a deadline."""


@dataclass(frozen=True)
class Answers:
    """One model's."""

    held_out: list[Sample]
    """In the order of the held-out prompts."""
    instructed: list[str]
    """`SAMPLES_PER_INSTRUCTION` for each instruction, in their order."""


@dataclass(frozen=True)
class _Roles:
    config: Config
    generators: GeneratorPool
    scorers: ScorerClient
    spawner: RoleSpawner


async def answers_of_models(
    config: Config,
    sft_model: str,
    reward_model: str | None,
    adapters: Mapping[str, AdapterFiles],
    held_out: Sequence[Prompt],
    instructed: Sequence[Prompt],
    bar: Bar,
    tell: Callable[[str], None],
) -> dict[str, Answers]:
    """Serve one model after the other and ask it everything."""
    asked = sample_requests(held_out, 1, config.run.seed, "evaluate")
    told = sample_requests(instructed, SAMPLES_PER_INSTRUCTION, config.run.seed, "instructions")
    spawner = RoleSpawner(config, lambda *_: None)
    await spawner.place([d for d in demands(config) if d.role in ("generator", "reward")])
    roles = _Roles(
        config,
        spawn_generators(spawner, _for_largest(config, adapters), sft_model, tell),
        spawn_scorers(spawner, config, reward_model, sft_model),
        spawner,
    )
    answers: dict[str, Answers] = {}
    try:
        await spawner.start_all([])
        for version, (name, files) in enumerate(adapters.items()):
            await roles.generators.publish(_update(version, files))
            held_out_samples = await _scored(roles, asked, version, bar)
            answers[name] = Answers(held_out_samples, await _texts(roles, told, version, bar))
    finally:
        await roles.generators.close()
        await spawner.stop_all()
    return answers


async def perplexities(
    config: Config,
    sft_model: str,
    adapters: Mapping[str, AdapterFiles],
    answers: Sequence[Rollout],
    bar: Bar,
) -> dict[str, float]:
    """exp of each model's mean loss over the tokens of given answers, at temperature 1."""
    spawner = RoleSpawner(config, lambda *_: None)
    place = config.placement
    one = Demand("likelihood", 1, place.gpus_of("reference"), place.reference.labels)
    await spawner.place([one])
    (worker,) = spawner.spawn(Likelihood, "likelihood", 1, config, sft_model)
    found = {}
    try:
        await spawner.start_all([])
        for name, files in adapters.items():
            await worker.call("hold", json.loads(files[ADAPTER_CONFIG]), files[WEIGHTS])
            loss, num_tokens = 0.0, 0
            for first in range(0, len(answers), ANSWERS_AT_ONCE):
                part = answers[first : first + ANSWERS_AT_ONCE]
                part_loss, part_tokens = await worker.call("loss", part)
                loss, num_tokens = loss + part_loss, num_tokens + part_tokens
                bar.advance(len(part))
            found[name] = math.exp(loss / num_tokens)
    finally:
        await spawner.stop_all()
    return found


async def _scored(
    roles: _Roles, requests: Sequence[SampleRequest], version: int, bar: Bar
) -> list[Sample]:
    """Answers to held-out prompts with their rewards."""
    samples: list[Sample] = []
    async for shard in _shards(roles, requests, version):
        scores = raw_sums(roles.config.rewards, await roles.scorers.score(shard))
        rollouts: list[Rollout] = await roles.spawner.fetch(shard.rollouts)
        samples += [
            {"position": r.position, "prompt": r.prompt, "text": r.text, "reward": score}
            for r, score in zip(rollouts, scores, strict=True)
        ]
        bar.advance(len(rollouts))
    return sorted(samples, key=lambda sample: sample["position"])


async def _texts(
    roles: _Roles, requests: Sequence[SampleRequest], version: int, bar: Bar
) -> list[str]:
    """Answers to instructions, in order of position."""
    texts: dict[int, str] = {}
    async for shard in _shards(roles, requests, version):
        rollouts: list[Rollout] = await roles.spawner.fetch(shard.rollouts)
        texts |= {rollout.position: rollout.text for rollout in rollouts}
        bar.advance(len(rollouts))
    return [texts[position] for position in range(len(requests))]


def _shards(roles: _Roles, requests: Sequence[SampleRequest], version: int) -> AsyncIterator[Shard]:
    """Shards as they are done."""
    size = roles.config.rollout.shard_size
    return roles.generators.generate(shard_requests(requests, size, version))


def _update(version: int, files: AdapterFiles) -> AdapterUpdate:
    state = digest(tensors_from_bytes(files[WEIGHTS]))
    return AdapterUpdate(version, state, json.loads(files[ADAPTER_CONFIG]), files[WEIGHTS])


def _for_largest(config: Config, adapters: Mapping[str, AdapterFiles]) -> Config:
    """The config by which engines make room for the largest rank: another run's may be larger."""
    rank = max(json.loads(files[ADAPTER_CONFIG])["r"] for files in adapters.values())
    lora = config.lora.model_copy(update={"r": max(config.lora.r, rank)})
    return config.model_copy(update={"lora": lora})
