"""Reward sources that are services, called once with short deadlines."""

import asyncio
from typing import Any

from json_server import chat_completion

from rlhf_ray.config.rewards import JudgeSourceConfig, RemoteSourceConfig
from rlhf_ray.rewards.judge import JudgeSource
from rlhf_ray.rewards.remote import RemoteSource
from rlhf_ray.types import Rollout

QUICK = {"timeout_s": 5.0, "retry_wait_s": 0.01}


def judge(url: str, rollouts: list[Rollout], **keys: Any) -> list[float | None]:
    config = JudgeSourceConfig(type="judge", url=f"{url}/v1/", model="m", **(QUICK | keys))
    return asyncio.run(JudgeSource(config).score(rollouts))


def remote(url: str, rollouts: list[Rollout], **keys: Any) -> list[float | None]:
    config = RemoteSourceConfig(type="remote", url=f"{url}/get_reward", **(QUICK | keys))
    return asyncio.run(RemoteSource(config).score(rollouts))


def rates_length(number: int, body: Any) -> tuple[int, Any]:
    """A judge that counts the characters between the response's tags."""
    question = body["messages"][-1]["content"]
    response = question.partition("<response>\n")[2].partition("\n</response>")[0]
    return 200, chat_completion(f"It might be a rating: 1. I say\nRating: {len(response)}")
