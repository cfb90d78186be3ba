"""Rollouts that an engine draws for a learner."""

import asyncio
import dataclasses
from typing import Any

from actors.policy_learner import PolicyLearner
from rlhf_ray.config import Config
from rlhf_ray.engines.factory import generation_engine
from rlhf_ray.models.stop_conditions import stop_token_ids
from rlhf_ray.types import Prompt, Rollout, SampleRequest


def drawn(policy: PolicyLearner, config: Config, base: str) -> list[Rollout]:
    """Return rollouts that an engine draws under the policy's adapter."""
    engine = generation_engine(config, base, stop_token_ids(base, config.template))
    requests = [
        SampleRequest(i, Prompt(str(i), "", tuple(range(20 + i, 26 + 2 * i))), seed=i)
        for i in range(8)
    ]

    async def draw() -> list[Any]:
        await engine.start()
        tensors, update = policy.adapter(1)
        await engine.serve(dataclasses.replace(update, tensors=tensors))
        return await engine.sample(requests)

    return [
        Rollout(
            position=request.position,
            prompt=request.prompt,
            response_ids=result.token_ids,
            rollout_logprobs=result.logprobs,
            finish_reason=result.finish_reason,
            version=1,
            text="",
        )
        for request, result in zip(requests, asyncio.run(draw()), strict=True)
    ]
