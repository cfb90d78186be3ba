import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from actors.generator import Generator
from actors.reference import Reference
from actors.reward_scorer import RewardScorer
from rlhf_ray.config import Config
from rlhf_ray.config.rewards import RougeSourceConfig
from rlhf_ray.engines.fake import FakeEngine
from rlhf_ray.engines.served_adapters import digest, tensors_to_bytes
from rlhf_ray.errors import ActorFailure, DivergenceError, WeightSyncError
from rlhf_ray.types import (
    AdapterUpdate,
    Prompt,
    RawScores,
    Rollout,
    SampleRequest,
    ServedAdapter,
    ShardRequest,
)

MakeConfig = Callable[..., Config]
STATE = {"m.lora_A.weight": torch.ones(1, 1), "m.lora_B.weight": torch.zeros(32, 1)}


def update(version: int, wrong: str = "") -> AdapterUpdate:
    return AdapterUpdate(version, wrong or digest(STATE), {}, None)


class Decoder:
    """A tokenizer that decodes token ids to their numbers, each with a space behind it."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(f"{token} " for token in ids)


def request(version: int) -> ShardRequest:
    samples = tuple(
        SampleRequest(position, Prompt(str(position), "", (1, 2)), seed=position)
        for position in (6, 7, 8)
    )
    return ShardRequest(2, samples, version)


class TestGenerator:
    @pytest.fixture
    def generator(self) -> Generator:
        generator = Generator("generator-0", FakeEngine, Decoder)
        asyncio.run(generator.start())
        return generator

    def publish(self, generator: Generator, sent: AdapterUpdate) -> Any:
        return asyncio.run(generator.publish(sent, tensors_to_bytes(STATE)))

    def test_it_labels_what_it_samples(self, generator: Generator) -> None:
        assert self.publish(generator, update(5)).version == 5
        rollouts, info = asyncio.run(generator.generate(request(5)))
        assert info.index == 2
        assert info.positions == tuple(row.position for row in rollouts) == (6, 7, 8)
        assert info.versions == (5, 5, 5)
        for row, length, stopped in zip(rollouts, info.response_lengths, info.stopped, strict=True):
            assert len(row.response_ids) == len(row.rollout_logprobs) == length
            assert stopped == (row.finish_reason == "stop")
            assert row.text == "".join(f"{token} " for token in row.response_ids)
        assert info.repeating == tuple(row.repeats_a_token for row in rollouts)
        assert info.distinct_bigrams == tuple(row.distinct_bigrams for row in rollouts)

    @pytest.mark.parametrize("asked", [4, 6])
    def test_it_refuses_another_version(self, generator: Generator, asked: int) -> None:
        self.publish(generator, update(5))
        with pytest.raises(WeightSyncError, match=f"called for version {asked} and serves 5"):
            asyncio.run(generator.generate(request(asked)))

    def test_it_refuses_before_the_first_publication(self, generator: Generator) -> None:
        with pytest.raises(WeightSyncError, match="called for version 0 and serves None"):
            asyncio.run(generator.generate(request(0)))

    def test_a_publication_that_failed_leaves_it_serving_nothing(
        self, generator: Generator
    ) -> None:
        self.publish(generator, update(5))
        with pytest.raises(WeightSyncError, match="sent with digest"):
            self.publish(generator, update(6, wrong="0" * 16))
        for version in (5, 6):
            with pytest.raises(WeightSyncError, match="serves None"):
                asyncio.run(generator.generate(request(version)))

    def test_it_wakes_up_serving_what_it_served(self, generator: Generator) -> None:
        self.publish(generator, update(5))
        before, _ = asyncio.run(generator.generate(request(5)))
        asyncio.run(generator.sleep())
        with pytest.raises(RuntimeError, match="called before start or after stop"):
            asyncio.run(generator.generate(request(5)))
        asyncio.run(generator.wake())
        after, info = asyncio.run(generator.generate(request(5)))
        assert info.versions == (5, 5, 5)
        assert [row.text for row in after] == [row.text for row in before]

    def test_it_says_that_it_woke_up_with_something_else(self) -> None:
        class Drifting(FakeEngine):
            async def serve(self, update: AdapterUpdate) -> ServedAdapter:
                served = await super().serve(update)
                return replace(served, digest="other") if self.calls["wake"] else served

        generator = Generator("generator-0", Drifting, Decoder)
        asyncio.run(generator.start())
        self.publish(generator, update(5))
        asyncio.run(generator.sleep())
        with pytest.raises(WeightSyncError, match="woke up with digest other instead of version 5"):
            asyncio.run(generator.wake())

    def test_it_may_sleep_before_it_serves_anything(self, generator: Generator) -> None:
        asyncio.run(generator.sleep())
        asyncio.run(generator.wake())
        assert self.publish(generator, update(0)).version == 0


class FixedSource:
    """A source that returns the scores given to it."""

    def __init__(self, *scores: float | None) -> None:
        self._scores = scores

    async def score(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        return list(self._scores)


class TestRewardScorer:
    def score(
        self, sources: dict[str, FixedSource], rollouts: list[Rollout], **keys: Any
    ) -> RawScores:
        settings = [RougeSourceConfig(type="rouge", name=name, **keys) for name in sources]
        scorer = RewardScorer("reward-0", settings, lambda: sources)
        scorer.start()
        return asyncio.run(scorer.score(rollouts))

    def test_every_source_scores_every_response(self, rollouts: list[Rollout]) -> None:
        sources = {"a": FixedSource(1.0, 2.0), "b": FixedSource(None, -1.0)}
        scores = self.score(sources, rollouts[:2])
        assert scores == {"a": (1.0, 2.0), "b": (None, -1.0)}

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_score_that_is_no_number(self, bad: float, rollouts: list[Rollout]) -> None:
        sources = {"a": FixedSource(1.0, bad)}
        with pytest.raises(
            DivergenceError, match=f"a scored the response to prompt 1 {bad}; .*skip"
        ):
            self.score(sources, rollouts[:2])
        assert self.score(sources, rollouts[:2], on_bad_score="skip") == {"a": (1.0, None)}

    def test_a_source_that_takes_too_long_is_named(self, rollouts: list[Rollout]) -> None:
        class SlowSource:
            async def score(self, rollouts: Sequence[Rollout]) -> list[float | None]:
                await asyncio.sleep(60)
                return []

        settings = [RougeSourceConfig(type="rouge", name="slow")]
        scorer = RewardScorer("reward-0", settings, lambda: {"slow": SlowSource()}, limit_s=0.05)
        scorer.start()
        says = (
            r"slow did not score a shard of 2 responses within 0 s, the last 0\.05 s "
            r"\(its part of cluster\.call_timeout_s\) without any progress"
        )
        with pytest.raises(ActorFailure, match=says):
            asyncio.run(scorer.score(rollouts[:2]))


def test_the_reference_is_the_base_at_the_rollouts_temperature(
    make_config: MakeConfig, base: str, rollouts: list[Rollout], policy: Any
) -> None:
    """The adapter of a fresh policy is zero, so reference and policy must agree."""
    logprobs, _ = Reference("reference-0", make_config(), base).logprobs(rollouts)
    own, _ = policy.logprobs(rollouts)
    for ours, theirs in zip(own, logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    config = make_config(rollout={"temperature": 0.5})
    sharper, _ = Reference("reference-0", config, base).logprobs(rollouts)
    assert not np.allclose(np.concatenate(sharper), np.concatenate(logprobs), atol=1e-3)
