"""A generator over an engine with faults, the learner that it is held against, and their proof."""

from dataclasses import dataclass
from typing import Any

import torch
from faulty_engine import LONG, TEMPERATURE, FaultyEngine

from actors.generator import Generator
from actors.policy_learner import PolicyLearner
from rlhf_ray.algorithms.logprobs import sampling_rule
from rlhf_ray.cluster.learner_groups import PolicyClient
from rlhf_ray.cluster.role_clients import GeneratorClient
from rlhf_ray.cluster.workers import InlineWorker
from rlhf_ray.config import Config, resolve
from rlhf_ray.driver.mismatch import MismatchGuard
from rlhf_ray.driver.weight_sync import WeightSync, probe_requests, publish_to
from rlhf_ray.engines.vllm.engine import VllmSettings
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.models.stop_conditions import stop_token_ids
from rlhf_ray.types import AdapterUpdate, Mismatch, Prompt, ScoredShard, ShardRequest

CANARY_TOKENS = 260
"""Over two blocks of the prefix cache, which holds 128 tokens a block on CPU."""


@dataclass(frozen=True)
class Setup:
    """An engine, the learner that it is held against, and the driver's checks between them."""

    config: Config
    engine: FaultyEngine
    generator: GeneratorClient
    learner: PolicyLearner
    policy: PolicyClient
    sync: WeightSync

    async def prove(self) -> None:
        """Have the generator pass the proof."""
        await (await self.sync.proof())(self.generator)

    async def publish(self, version: int) -> AdapterUpdate:
        """Send the learner's adapter to the generator."""
        update = await self.policy.adapter(version)
        await publish_to(self.generator, update)
        return update

    async def sample(self, version: int) -> Any:
        """A shard of the canaries under the version that is served."""
        request = ShardRequest(index=0, samples=tuple(self.sync.probe_prompts), version=version)
        return await self.generator.generate(request)

    async def check(self, guard: MismatchGuard, version: int) -> None:
        """Check the mismatch of a new shard."""
        shard = await self.sample(version)
        _, gap = await self.policy.logprobs(shard)
        guard.check([scored(shard, gap)])

    async def gap(self, version: int) -> Mismatch:
        """Difference between engine and learner on a shard of the canaries."""
        _, gap = await self.policy.logprobs(await self.sample(version))
        return gap


def pad_and_end(model: str) -> list[int]:
    """Ids that some models list as their ends."""
    tokenizer = load_tokenizer(model)
    return [int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)]  # type: ignore[arg-type]


def make_config(dtype: str, serving: str, parallel: int, **lora: Any) -> Config:
    return resolve(
        {
            "generators": {"tensor_parallel_size": parallel},
            "model": {"dtype": dtype, "max_length": 320},
            "lora": {"r": 8, **lora},
            "rollout": {
                "max_prompt_tokens": CANARY_TOKENS,
                "max_tokens": LONG.max_tokens,
                "temperature": TEMPERATURE,
                "serving": serving,
            },
        }
    )


def engine_settings(config: Config, model: str) -> VllmSettings:
    return VllmSettings(
        model=model,
        dtype=config.engine_dtype,
        serving=config.serving,
        lora_rank=config.lora.r,
        max_model_len=config.model.max_length,
        rule=sampling_rule(config.rollout, stop_token_ids(model)),
        stop_conditions=LONG,
        tensor_parallel_size=config.generators.tensor_parallel_size,
        extension="faulty_extension.FaultyExtension",
    )


def make_setup(config: Config, model: str, engine: FaultyEngine) -> Setup:
    generator = Generator("generator-0", lambda: engine, lambda: load_tokenizer(model))
    learner = PolicyLearner("policy-0", config, model, "torch")
    learner.start()
    policy = PolicyClient([InlineWorker("policy-0", learner, lambda *_: None)], zero_stage=2)
    tokenizer = load_tokenizer(model)
    text = "Why does the kettle leak? Because it is worn. How does the pump hum?"
    prompts = [Prompt("0", text, tuple(tokenizer(text)["input_ids"]))]
    canaries = probe_requests(prompts, CANARY_TOKENS, seed=0)
    return Setup(
        config,
        engine,
        GeneratorClient(InlineWorker("generator-0", generator, lambda *_: None)),
        learner,
        policy,
        WeightSync(policy, canaries, config.engine_is_exact),
    )


def move(learner: PolicyLearner, seed: int) -> None:
    """Give the policy a random adapter that changes what it says a good deal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in learner._engine.module.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)


def scored(shard: Any, gap: Mismatch) -> ScoredShard:
    return ScoredShard(shard, (), None, None, None, gap)
