import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from actors.generator import Generator
from actors.reference import Reference
from actors.reward_scorer import RewardScorer
from rlhf_ray.config import Config
from rlhf_ray.config.model import ModelConfig, TinyModelConfig
from rlhf_ray.engines.fake import FakeEngine
from rlhf_ray.errors import WeightSyncError
from rlhf_ray.models import tiny
from rlhf_ray.models.adapters import digest, tensors_to_bytes
from rlhf_ray.models.forward import sequence_of
from rlhf_ray.models.heads import initialise_head
from rlhf_ray.models.loading import load_sequence_classifier, load_tokenizer, save_model
from rlhf_ray.types import AdapterUpdate, Prompt, Rollout, SampleRequest, ShardRequest

MakeConfig = Callable[..., Config]
STATE = {"m.lora_A.weight": torch.ones(1, 1), "m.lora_B.weight": torch.zeros(32, 1)}


def update(version: int, wrong: str = "") -> AdapterUpdate:
    return AdapterUpdate(version, wrong or digest(STATE), {}, None)


class Decoder:
    """Spells token ids out."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(map(str, ids))


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
            assert row.text == " ".join(map(str, row.response_ids.tolist()))

    @pytest.mark.parametrize("asked", [4, 6])
    def test_it_refuses_another_version(self, generator: Generator, asked: int) -> None:
        self.publish(generator, update(5))
        with pytest.raises(WeightSyncError, match=f"asked for version {asked} and serves 5"):
            asyncio.run(generator.generate(request(asked)))

    def test_it_refuses_before_the_first_publication(self, generator: Generator) -> None:
        with pytest.raises(WeightSyncError, match="asked for version 0 and serves None"):
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


def make_rollout(tokenizer: Any, prompt: str, response: str, *, stopped: bool) -> Rollout:
    """What a generator would return for these texts."""
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    ids += [tokenizer.eos_token_id] if stopped else []
    return Rollout(
        position=0,
        prompt=Prompt("0", prompt, tuple(tokenizer(prompt)["input_ids"])),
        response_ids=np.array(ids, np.int64),
        rollout_logprobs=np.zeros(len(ids), np.float32),
        finish_reason="stop" if stopped else "length",
        version=0,
        text=response,
    )


class TestRewardScorer:
    PROMPT = "Question: how do I sort list 3?\n\nAnswer: "
    TEXTS = ("call sorted", "no", "call it, and then call it again")

    def classifier(self, base: str, folder: Path) -> str:
        model = load_sequence_classifier(base, ModelConfig(), zero_head=True)
        initialise_head(model, seed=0)
        save_model(model, load_tokenizer(base), folder)
        return str(folder)

    def rollouts(self, base: str) -> list[Rollout]:
        tokenizer = load_tokenizer(base)
        return [
            make_rollout(tokenizer, self.PROMPT, text, stopped=i != 1)
            for i, text in enumerate(self.TEXTS)
        ]

    def plain_scores(self, model_path: str, sequences: list[list[int]]) -> list[float]:
        model = AutoModelForSequenceClassification.from_pretrained(model_path).eval()
        with torch.no_grad():
            return [float(model(torch.tensor([ids])).logits[0, 0]) for ids in sequences]

    def test_one_tokenizer_reads_the_rollouts_own_tokens(
        self, make_config: MakeConfig, base: str, tmp_path: Path
    ) -> None:
        path = self.classifier(base, tmp_path / "reward")
        scorer = RewardScorer("reward-0", make_config(), path, base)
        rollouts = self.rollouts(base)
        expected = self.plain_scores(path, [sequence_of(row).tolist() for row in rollouts])
        assert scorer.score(rollouts) == pytest.approx(expected, abs=1e-5)
        assert len(set(expected)) == 3

    def test_the_baseline_is_subtracted(
        self, make_config: MakeConfig, base: str, tmp_path: Path
    ) -> None:
        path = self.classifier(base, tmp_path / "reward")
        rollouts = self.rollouts(base)
        plain = RewardScorer("reward-0", make_config(), path, base).score(rollouts)
        config = make_config(reward={"baseline": 0.75})
        moved = RewardScorer("reward-0", config, path, base).score(rollouts)
        assert moved == pytest.approx([score - 0.75 for score in plain])

    def test_another_tokenizer_reads_the_text(
        self, make_config: MakeConfig, base: str, tmp_path: Path
    ) -> None:
        other = tmp_path / "other"
        shape = TinyModelConfig(
            vocab_size=330, hidden_size=32, intermediate_size=64, num_heads=2, num_layers=1
        )
        tiny.build(other, ["other words here", self.PROMPT], shape, max_length=64, seed=1)
        path = self.classifier(str(other), tmp_path / "reward")
        scorer = RewardScorer("reward-0", make_config(), path, base)
        tokenizer = load_tokenizer(path)
        sequences = []
        for i, text in enumerate(self.TEXTS):
            ids = tokenizer(self.PROMPT + text, add_special_tokens=False)["input_ids"]
            # A response that was cut at the limit has no end of sequence to be scored at.
            sequences.append(ids + ([tokenizer.eos_token_id] if i != 1 else []))
        rollouts = self.rollouts(base)
        assert sequences[0] != sequence_of(rollouts[0]).tolist()
        expected = self.plain_scores(path, sequences)
        assert scorer.score(rollouts) == pytest.approx(expected, abs=1e-5)


def test_the_reference_is_the_base_at_the_rollouts_temperature(
    make_config: MakeConfig, base: str, rollouts: list[Rollout], policy: Any
) -> None:
    """A fresh policy's adapter is zero: the reference must agree with it."""
    logprobs, _ = Reference("reference-0", make_config(), base).logprobs(rollouts)
    own, _ = policy.logprobs(rollouts)
    for ours, theirs in zip(own, logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    config = make_config(rollout={"temperature": 0.5})
    sharper, _ = Reference("reference-0", config, base).logprobs(rollouts)
    assert not np.allclose(np.concatenate(sharper), np.concatenate(logprobs), atol=1e-3)
