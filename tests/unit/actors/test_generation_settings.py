"""Tests of min_tokens and ignored stop tokens: learners compute what the engine has drawn."""

import dataclasses
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from drawn_rollouts import drawn
from transformers import GenerationConfig

from actors.policy_learner import PolicyLearner
from actors.reference import Reference
from rlhf_ray.config import Config
from rlhf_ray.types import Rollout

MakeConfig = Callable[..., Config]
SETTINGS: dict[str, dict[str, Any]] = {
    "late ends": {"min_tokens": 5},
    "late ends among the likeliest": {"min_tokens": 5, "top_k": 20, "top_p": 0.8},
    "never": {"ignore_eos": True, "length_sampler": {"min": 3, "max": 12}},
    "all at once": {
        "min_tokens": 3,
        "length_sampler": {"min": 4, "max": 16},
        "stop": ["e"],
        "temperature": 0.9,
    },
}


@pytest.fixture(scope="module")
def model(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The base model; every third token is a stop token."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("models") / "ends")
    GenerationConfig(eos_token_id=list(range(2, 300, 3))).save_pretrained(folder)
    return str(folder)


def learner(config: Config, model: str) -> PolicyLearner:
    policy = PolicyLearner("policy-0", config, model, "torch")
    policy.start()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in policy._engine.module.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return policy


def assemble(policy: PolicyLearner, reference: Reference, rollouts: list[Rollout]) -> None:
    old, _ = policy.logprobs(rollouts)
    ref, _ = reference.logprobs(rollouts)
    values = [np.zeros_like(logprobs) for logprobs in old]
    scores = tuple(float(i % 2) for i in range(len(rollouts)))
    policy.assemble(0.1, [scores], rollouts, old, ref, values)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_engine_learner_and_reference_mean_the_same_distribution(
    make_config: MakeConfig, model: str, settings: dict[str, Any]
) -> None:
    config = make_config(rollout=settings, ppo={"mini_batch_size": 8})
    policy = learner(config, model)
    rollouts = drawn(policy, config, model)
    _, gap = policy.logprobs(rollouts)
    assert gap.largest < 1e-4
    reference = Reference("reference-0", config, model)
    ref, _ = reference.logprobs(rollouts)
    base, _ = policy.ref_logprobs(rollouts)
    np.testing.assert_allclose(np.concatenate(ref), np.concatenate(base), atol=1e-6)
    assemble(policy, reference, rollouts)
    metrics = policy.learn(0.5, 1.0).metrics
    assert metrics["val/ratio_max"] == pytest.approx(1, abs=1e-4)
    assert len({len(rollout.response_ids) for rollout in rollouts}) > 1


def test_an_uncorrected_learner_would_be_far_from_the_engine(
    make_config: MakeConfig, model: str
) -> None:
    policy = learner(make_config(rollout={"min_tokens": 5}), model)
    rollouts = drawn(policy, make_config(rollout={"min_tokens": 5}), model)
    plain = learner(make_config(), model)
    _, gap = plain.logprobs(rollouts)
    assert gap.mean > 0.1


@pytest.mark.parametrize("settings", [SETTINGS["never"], SETTINGS["all at once"]])
def test_exactly_the_tokens_that_were_drawn_are_learnt(
    make_config: MakeConfig, model: str, settings: dict[str, Any]
) -> None:
    """No token is forced or added: after an early stop, padding has no effect on a loss."""
    ppo = {"mini_batch_size": 8, "entropy_coef": 0.1, "kl_in": "loss", "kl_estimator": "k3"}
    config = make_config(rollout=settings, ppo=ppo)
    reference, results = Reference("reference-0", config, model), []
    for at_padding in (0.0, 3.0):
        policy = learner(config, model)
        rollouts = drawn(policy, config, model)
        assemble(policy, reference, rollouts)
        batch = policy._experience
        lengths = [len(rollout.response_ids) for rollout in rollouts]
        assert batch.mask_BT.sum(1).tolist() == lengths
        for row, rollout in zip(batch.responses_BT, rollouts, strict=True):
            assert row[: len(rollout.response_ids)].tolist() == rollout.response_ids.tolist()
        padding_BT = ~batch.mask_BT
        names = ("rollout_logprobs_BT", "old_logprobs_BT", "ref_logprobs_BT", "advantages_BT")
        filled = {name: getattr(batch, name) + at_padding * padding_BT for name in names}
        tokens_BT = batch.responses_BT.where(batch.mask_BT, torch.tensor(int(at_padding) + 4))
        policy._experience = dataclasses.replace(batch, responses_BT=tokens_BT, **filled)
        metrics = policy.learn(0.5, 1.0).metrics
        state = policy._engine.export_state()
        moments = [t.flatten() for name, t in state.items() if name.startswith("exp_a")]
        results.append((metrics, torch.cat(moments)))
    (metrics, moments), (other_metrics, other_moments) = results
    assert moments.abs().max() > 0
    assert metrics == pytest.approx(other_metrics, rel=1e-6)
    torch.testing.assert_close(moments, other_moments, rtol=1e-5, atol=1e-9)
