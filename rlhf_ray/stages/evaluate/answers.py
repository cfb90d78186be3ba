"""Sample every compared model on the same prompts under the same seeds; measure perplexity."""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from actors.likelihood import Likelihood
from rlhf_ray.cluster.role_clients import GeneratorClient, ScorerClient
from rlhf_ray.cluster.spawner import RoleSpawner
from rlhf_ray.cluster.workers import Worker, fetch
from rlhf_ray.config import Config
from rlhf_ray.driver.batches import sample_requests, shard_requests
from rlhf_ray.engines.served_adapters import digest, tensors_from_bytes
from rlhf_ray.generators.pool import GeneratorPool
from rlhf_ray.models.folders import ADAPTER_CONFIG
from rlhf_ray.observability.progress import Bar
from rlhf_ray.placement.idle_actors import needs_no_slots
from rlhf_ray.placement.layout import held_at_once
from rlhf_ray.rewards.combine import raw_sums
from rlhf_ray.stages.evaluate.inputs import Inputs
from rlhf_ray.stages.evaluate.models import WEIGHTS, AdapterFiles
from rlhf_ray.stages.ppo.drains import drains_followed
from rlhf_ray.stages.ppo.generators import spawn_generators
from rlhf_ray.stages.ppo.roles import spawn_scorers
from rlhf_ray.types import AdapterUpdate, Prompt, Rollout, SampleRequest, Shard

SAMPLES_PER_INSTRUCTION = 4
ANSWERS_AT_ONCE = 64
"""Reference answers in one call, which has a deadline."""


@dataclass(frozen=True)
class Sample:
    """One model's answer to a held-out prompt, with its scores."""

    prompt: Prompt
    text: str
    scores: dict[str, float | None]
    """By name: reward, gold, rouge; None where the response could not be scored."""


@dataclass(frozen=True)
class Answers:
    """One model's answers."""

    held_out: list[Sample]
    """In the order of the held-out prompts."""
    instructed: list[str]
    """`SAMPLES_PER_INSTRUCTION` for each instruction, in their order."""


async def answers_of_models(
    inputs: Inputs, bar: Bar, say: Callable[[str], None]
) -> dict[str, Answers]:
    """Serve one model after the other, and sample its answers to every prompt."""
    config, seed = _at_its_temperature(inputs.config), inputs.config.run.seed
    held_out = sample_requests(inputs.prompts, 1, seed, "evaluate")
    instructed = sample_requests(
        inputs.instruction_prompts, SAMPLES_PER_INSTRUCTION, seed, "instructions"
    )
    spawner = RoleSpawner(config, lambda *_: None, say=say)
    await spawner.place(held_at_once(config, ["evaluate"])["evaluate"])
    roles = _Roles(
        config,
        spawn_generators(spawner, _for_largest(config, inputs.adapters), inputs.sft_model, say),
        spawn_scorers(spawner, config, inputs.reward_model, inputs.sft_model),
        bar,
    )
    answers: dict[str, Answers] = {}
    try:
        async with drains_followed(spawner, {}, say):
            await asyncio.gather(spawner.start_all([]), roles.generators.start())
            for version, (name, files) in enumerate(inputs.adapters.items()):
                await roles.generators.publish(_update(version, files))
                answers[name] = Answers(
                    held_out=await roles.scored(held_out, version),
                    instructed=await roles.texts(instructed, version),
                )
    finally:
        await roles.generators.close()
        await spawner.stop_all()
    return answers


@dataclass(frozen=True)
class _Roles:
    config: Config
    generators: GeneratorPool[GeneratorClient]
    scorers: ScorerClient
    bar: Bar

    async def scored(self, requests: Sequence[SampleRequest], version: int) -> list[Sample]:
        """Sample answers with their rewards, in order of position."""
        samples: dict[int, Sample] = {}
        async for shard, rollouts in self._shards(requests, version):
            rewards = raw_sums(self.config.rewards, await self.scorers.score(shard))
            for rollout, reward in zip(rollouts, rewards, strict=True):
                sample = Sample(rollout.prompt, rollout.text, {"reward": reward})
                samples[rollout.position] = sample
        return [samples[position] for position in range(len(requests))]

    async def texts(self, requests: Sequence[SampleRequest], version: int) -> list[str]:
        """Sample answers, in order of position."""
        texts: dict[int, str] = {}
        async for _, rollouts in self._shards(requests, version):
            texts |= {rollout.position: rollout.text for rollout in rollouts}
        return [texts[position] for position in range(len(requests))]

    async def _shards(
        self, requests: Sequence[SampleRequest], version: int
    ) -> AsyncIterator[tuple[Shard, list[Rollout]]]:
        shards = shard_requests(requests, self.config.rollout.shard_size, version)
        async for shard in self.generators.generate(shards):
            rollouts: list[Rollout] = await fetch(shard.rollouts)
            yield shard, rollouts
            self.bar.advance(len(rollouts))


def begin_likelihood(inputs: Inputs) -> None:
    """Start the process of `perplexities` while models answer, where it needs no slot."""
    if needs_no_slots(inputs.config):
        spawner = RoleSpawner(inputs.config, lambda *_: None)
        spawner.spawn(Likelihood, "likelihood", 1, inputs.config, inputs.sft_model)
        spawner.leave(["likelihood-0"])


async def perplexities(
    inputs: Inputs, answers: Sequence[Rollout], bar: Bar, say: Callable[[str], None]
) -> dict[str, float]:
    """Return exp of each model's mean loss over the tokens of ``answers``, at temperature 1."""
    spawner = RoleSpawner(inputs.config, lambda *_: None, say=say)
    await spawner.place(held_at_once(inputs.config, ["evaluate"])["perplexity"])
    crew = spawner.spawn_crew(Likelihood, "likelihood", 1, inputs.config, inputs.sft_model)
    results = {}
    try:
        async with drains_followed(spawner, {}, say):
            await spawner.start_all([])
            for name, files in inputs.adapters.items():
                loss_of = _loss_under(json.loads(files[ADAPTER_CONFIG]), files[WEIGHTS])
                loss, num_tokens = 0.0, 0
                for first in range(0, len(answers), ANSWERS_AT_ONCE):
                    part = answers[first : first + ANSWERS_AT_ONCE]
                    part_loss, part_tokens = await crew.ask(partial(loss_of, part))
                    loss, num_tokens = loss + part_loss, num_tokens + part_tokens
                    bar.advance(len(part))
                results[name] = math.exp(loss / num_tokens)
    finally:
        await spawner.stop_all()
    return results


def _loss_under(
    peft_config: Mapping[str, Any], tensors: bytes
) -> Callable[[Sequence[Rollout], Worker[Likelihood]], Awaitable[tuple[float, int]]]:
    """Return a call of `Likelihood.loss` that first has a worker hold the adapter, if it is new."""
    holder: Worker[Likelihood] | None = None

    async def loss(answers: Sequence[Rollout], worker: Worker[Likelihood]) -> tuple[float, int]:
        nonlocal holder
        if worker is not holder:
            await worker.call(Likelihood.hold, peft_config, tensors)
            holder = worker
        return await worker.call(Likelihood.loss, answers)

    return loss


def _update(version: int, files: AdapterFiles) -> AdapterUpdate:
    state = digest(tensors_from_bytes(files[WEIGHTS]))
    return AdapterUpdate(version, state, json.loads(files[ADAPTER_CONFIG]), files[WEIGHTS])


def _at_its_temperature(config: Config) -> Config:
    """Sample at ``evaluate.temperature`` where it is set."""
    temperature = config.evaluate.temperature or config.rollout.temperature
    rollout = config.rollout.model_copy(update={"temperature": temperature})
    return config.model_copy(update={"rollout": rollout})


def _for_largest(config: Config, adapters: Mapping[str, AdapterFiles]) -> Config:
    """Raise ``lora.r`` to the largest rank compared, which another run may have set.

    Engines reserve memory for the rank when they start.
    """
    rank = max(json.loads(files[ADAPTER_CONFIG])["r"] for files in adapters.values())
    lora = config.lora.model_copy(update={"r": max(config.lora.r, rank)})
    return config.model_copy(update={"lora": lora})
