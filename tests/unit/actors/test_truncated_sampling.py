"""Tests of top-k and top-p: all log-probs are of the distribution that rollouts are drawn from."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from drawn_rollouts import drawn

from actors.policy_learner import PolicyLearner
from actors.reference import Reference
from rlhf_ray.config import Config
from rlhf_ray.models.loading import load_causal_lm
from rlhf_ray.types import Rollout

RULE = {"top_k": 20, "top_p": 0.8, "temperature": 0.9}


@pytest.fixture
def config(make_config: Callable[..., Config]) -> Config:
    return make_config(rollout=RULE, ppo={"mini_batch_size": 8})


def learn(policy: PolicyLearner, rollouts: list[Rollout], ref_gap: float = 0.0) -> Any:
    """Run one iteration in which every other response gets a good score."""
    old, _ = policy.logprobs(rollouts)
    ref = [logprobs - ref_gap for logprobs in old]
    values = [np.zeros_like(logprobs) for logprobs in old]
    scores = tuple(float(i % 2) for i in range(len(rollouts)))
    policy.assemble(0.1, [scores], rollouts, old, ref, values)
    return policy.learn(0.5, 1.0)


def plain_logprobs(base: str, rollout: Rollout, temperature: float, top_k: int) -> list[float]:
    """Compute log-probs over the likeliest tokens and the drawn one, by sorting each position."""
    model = load_causal_lm(base, Config().model)
    ids = torch.tensor(rollout.sequence_ids)
    with torch.no_grad():
        logits_SV = model(ids[None]).logits[0].double() / temperature
    found = []
    for place in range(len(rollout.prompt.token_ids), len(ids)):
        logits_V, token = logits_SV[place - 1], int(ids[place])
        kept = {*logits_V.argsort(descending=True)[:top_k].tolist(), token}
        found.append(float(logits_V[token] - logits_V[sorted(kept)].logsumexp(0)))
    return found


def test_policy_and_reference_start_equal(
    config: Config, make_learner: Callable[..., Any], base: str, rollouts: list[Rollout]
) -> None:
    """Most tokens of random responses are outside both models' sets; log-probs must stay finite."""
    policy = make_learner(PolicyLearner, rollout=RULE)
    own, _ = policy.logprobs(rollouts)
    ref, _ = Reference("reference-0", config, base).logprobs(rollouts)
    for ours, theirs in zip(own, ref, strict=True):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    whole, _ = make_learner(PolicyLearner).logprobs(rollouts)
    assert np.concatenate(own).mean() > np.concatenate(whole).mean() + 0.1


def test_logprobs_are_renormalised_over_the_kept_tokens(
    make_learner: Callable[..., Any], base: str, rollouts: list[Rollout]
) -> None:
    policy = make_learner(PolicyLearner, rollout={"top_k": 5, "temperature": 0.9})
    own, _ = policy.logprobs(rollouts[:3])
    for rollout, logprobs in zip(rollouts, own, strict=False):
        assert logprobs.tolist() == pytest.approx(plain_logprobs(base, rollout, 0.9, 5), abs=1e-4)


def test_engine_and_learner_agree_also_after_learning(
    config: Config, make_learner: Callable[..., Any], base: str
) -> None:
    policy = make_learner(PolicyLearner, rollout=RULE, ppo={"mini_batch_size": 8, "epochs": 3})
    before, _ = policy.logprobs(drawn(policy, config, base))
    learn(policy, drawn(policy, config, base))
    rollouts = drawn(policy, config, base)
    after, gap = policy.logprobs(rollouts)
    assert gap.largest < 1e-4
    assert min(row.min() for row in after) > np.log(0.8 / 300) - 20  # no token of probability 0
    assert sum(map(len, after)) != sum(map(len, before)) or not all(
        np.allclose(a, b, atol=1e-3) for a, b in zip(after, before, strict=True)
    )


def test_the_first_step_starts_at_ratio_one(
    config: Config, make_learner: Callable[..., Any], base: str
) -> None:
    policy = make_learner(PolicyLearner, rollout=RULE, ppo={"mini_batch_size": 8})
    metrics = learn(policy, drawn(policy, config, base)).metrics
    assert metrics["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["val/ratio_max"] == pytest.approx(1, abs=1e-4)
    # At most that of 20 equally likely tokens, far below the 5.7 of the whole vocabulary of 300.
    assert 0 < metrics["policy/entropy_avg"] < np.log(20)


def test_a_step_does_not_depend_on_the_micro_batches(
    config: Config, make_learner: Callable[..., Any], base: str
) -> None:
    moments = []
    for max_tokens in (48, 100_000):
        ppo = {"mini_batch_size": 8, "max_tokens_per_micro_batch": max_tokens}
        policy = make_learner(PolicyLearner, rollout=RULE, ppo=ppo)
        learn(policy, drawn(policy, config, base))
        state = policy._engine.export_state()
        moments.append(torch.cat([t.flatten() for n, t in state.items() if n.startswith("exp_a")]))
    assert moments[0].abs().max() > 0
    torch.testing.assert_close(moments[0], moments[1], rtol=1e-3, atol=1e-6)


def test_a_step_makes_good_responses_likelier(
    config: Config, make_learner: Callable[..., Any], base: str
) -> None:
    policy = make_learner(PolicyLearner, rollout=RULE, ppo={"mini_batch_size": 8, "epochs": 3})
    rollouts = drawn(policy, config, base)
    before, _ = policy.logprobs(rollouts)
    learn(policy, rollouts)
    after, _ = policy.logprobs(rollouts)
    gains = [float((a - b).mean()) for a, b in zip(after, before, strict=True)]
    assert np.mean(gains[1::2]) > 0 > np.mean(gains[::2])
