"""Tests of the options of `ppo`: their effect on experience, loss and steps."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from actors.critic_learner import CriticLearner
from actors.policy_learner import PolicyLearner
from rlhf_ray.errors import ConfigError
from rlhf_ray.types import AssembledStats, Rollout

SCORES = [0.5, -1.0, 2.0, 0.0, 1.5, -0.5, 0.25, 1.0]
MakeLearner = Callable[..., Any]


def assemble(
    learner: Any, rollouts: list[Rollout], kl_coef: float = 0.0, values: Any = None, gap: float = 0
) -> AssembledStats:
    """Assemble one shard; the reference is .1 nat below the policy on every token."""
    old = [np.full(len(r.response_ids), -5 - gap, np.float32) for r in rollouts]
    if isinstance(learner, PolicyLearner) and not isinstance(learner._engine, SimpleNamespace):
        old = [row - gap for row in learner.logprobs(rollouts)[0]]
    ref = [row - 0.1 for row in old]
    return learner.assemble(kl_coef, [tuple(SCORES)], rollouts, old, ref, values)


def advantage_of_rows(learner: Any) -> list[float]:
    """Return the advantage of each row's first token; group estimators give all tokens the same."""
    batch = learner._experience
    assert (batch.advantages_BT == batch.advantages_BT[:, :1] * batch.mask_BT).all()
    return batch.advantages_BT[:, 0].tolist()


def test_groups_are_compared_without_a_critic(
    make_learner: MakeLearner, rollouts: list[Rollout]
) -> None:
    learner = make_learner(PolicyLearner, ppo={"advantage": "rloo", "samples_per_prompt": 2})
    assemble(learner, rollouts)
    assert advantage_of_rows(learner) == pytest.approx([1.5, -1.5, 2, -2, 2, -2, -0.75, 0.75])
    learner = make_learner(PolicyLearner, ppo={"advantage": "grpo", "samples_per_prompt": 2})
    assemble(learner, rollouts)
    assert [abs(a) for a in advantage_of_rows(learner)] == pytest.approx([2**-0.5] * 8)
    assert not learner._experience.values_BT.any()
    assert not learner._experience.returns_BT.any()


def test_the_penalty_in_the_reward_counts_towards_a_response(
    make_learner: MakeLearner, rollouts: list[Rollout]
) -> None:
    learner = make_learner(PolicyLearner, ppo={"advantage": "rloo", "samples_per_prompt": 2})
    assemble(learner, rollouts, kl_coef=2.0)
    totals = [s - 0.2 * len(r.response_ids) for s, r in zip(SCORES, rollouts, strict=True)]
    expected = [totals[row] - totals[row ^ 1] for row in range(8)]
    assert advantage_of_rows(learner) == pytest.approx(expected, abs=1e-4)


def test_ranks_that_share_a_group_compare_it_whole(
    make_config: Callable[..., Any], base: str, rollouts: list[Rollout]
) -> None:
    config = make_config(ppo={"advantage": "rloo", "samples_per_prompt": 2})
    whole, held = [1.5, -1.5, 2, -2, 2, -2, -0.75, 0.75], list[int]()
    for rank in (0, 1):
        learner = PolicyLearner("policy", config, base, "torch")
        cpu = torch.device("cpu")
        learner._engine = SimpleNamespace(rank=rank, world_size=2, device=cpu)  # type: ignore[assignment]
        stats = assemble(learner, rollouts)
        rows = [row for rows in learner._my_rows for row in rows]
        assert stats.num_samples == len(rows)
        assert advantage_of_rows(learner) == pytest.approx([whole[row] for row in rows])
        held += rows
    assert sorted(held) == list(range(8))


def test_kl_in_the_loss_pulls_towards_the_reference(
    make_learner: MakeLearner, rollouts: list[Rollout]
) -> None:
    ppo = {"kl_in": "loss", "kl_estimator": "k3", "mini_batch_size": 8}
    grad_norms = {}
    for kl_coef in (0.0, 0.5):
        learner = make_learner(PolicyLearner, ppo=ppo)
        stats = assemble(
            learner, rollouts, kl_coef, [np.zeros(len(r.response_ids)) for r in rollouts]
        )
        assert stats.reward_total == pytest.approx(sum(SCORES)), "the reward is the score alone"
        learner._experience.advantages_BT.zero_()
        report = learner.learn(0.0, 1.0)
        grad_norms[kl_coef] = report.metrics["policy/grad_norm"]
        # k3 of .1 nat: e^-.1 - 1 + .1
        assert report.metrics["loss/kl_avg"] == pytest.approx(0.0048374, rel=1e-2)
    assert grad_norms[0.0] == 0 < grad_norms[0.5]


def test_what_stands_at_padding_reaches_no_gradient(
    make_learner: MakeLearner, rollouts: list[Rollout]
) -> None:
    """The temperature is so low that k3's exponential overflows on a padding token."""
    ppo = {"kl_in": "loss", "kl_estimator": "k3", "mini_batch_size": 8, "advantage": "reinforce"}
    learner = make_learner(PolicyLearner, ppo=ppo, rollout={"temperature": 0.02})
    assemble(learner, rollouts, kl_coef=0.5)
    assert np.isfinite(learner.learn(0.0, 1.0).metrics["policy/grad_norm"])


def test_the_entropy_bonus_raises_the_entropy(
    make_learner: MakeLearner, rollouts: list[Rollout]
) -> None:
    entropies = []
    learner = make_learner(PolicyLearner, ppo={"entropy_coef": 0.1, "advantage": "reinforce"})
    for _ in range(4):
        assemble(learner, rollouts)
        learner._experience.advantages_BT.zero_()
        entropies.append(learner.learn(0.0, 1.0).metrics["policy/entropy_avg"])
    assert entropies[-1] > entropies[0]


def test_importance_weights_scale_the_loss_of_each_token(
    make_learner: MakeLearner, rollouts: list[Rollout]
) -> None:
    """The engine's log-prob is -5 everywhere; the cap binds where the learner's exceeds -4.9."""
    cap = float(np.exp(0.1))
    ppo = {"importance_cap": cap, "advantage": "reinforce", "mini_batch_size": 8}
    learner = make_learner(PolicyLearner, ppo=ppo)
    old = np.concatenate(learner.logprobs(rollouts)[0])
    weights = np.minimum(np.exp(old + 5), cap)
    assert (weights == cap).any()
    assert (weights < cap).any()
    assemble(learner, rollouts)
    scores = np.repeat(SCORES, [len(r.response_ids) for r in rollouts])
    report = learner.learn(0.0, 1.0)
    assert report.metrics["loss/policy_avg"] == pytest.approx(-(weights * scores).mean(), rel=1e-4)
    assert report.metrics["sampler/weight_mean"] == pytest.approx(weights.mean(), rel=1e-4)
    assert report.metrics["sampler/masked_share"] == 0
    ess = weights.sum() ** 2 / (weights**2).sum() / len(weights)
    assert report.metrics["sampler/ess_share"] == pytest.approx(ess, rel=1e-4)


def test_unequal_clips_and_a_dual_clip_bound_the_ratio(
    make_learner: MakeLearner, rollouts: list[Rollout]
) -> None:
    """Old log-probs are 1 nat lower, so every ratio is e."""

    def loss_of(**ppo: Any) -> float:
        learner = make_learner(
            PolicyLearner, ppo={"advantage": "reinforce", "mini_batch_size": 8, **ppo}
        )
        assemble(learner, rollouts, gap=1.0)
        return learner.learn(0.0, 1.0).metrics["loss/policy_avg"]

    advantages = np.repeat(SCORES, [len(r.response_ids) for r in rollouts])

    def expected(high: float, dual: float) -> float:
        return -np.where(advantages > 0, advantages * high, advantages * dual).mean()

    assert loss_of() == pytest.approx(expected(1.2, np.e), rel=1e-3)
    assert loss_of(clip_range_high=0.5) == pytest.approx(expected(1.5, np.e), rel=1e-3)
    assert loss_of(dual_clip=2.0) == pytest.approx(expected(1.2, 2.0), rel=1e-3)


def test_a_score_behind_the_last_token_has_a_value_of_its_own(
    make_learner: MakeLearner, rollouts: list[Rollout]
) -> None:
    longest = max(len(r.response_ids) for r in rollouts)
    sections: dict[str, Any] = {
        "ppo": {"score_position": "first_pad", "mini_batch_size": 8, "gae_lambda": 1.0},
        "rollout": {"max_tokens": longest},
    }
    critic = make_learner(CriticLearner, **sections)
    values, _ = critic.values(rollouts)
    assert [len(row) for row in values] == [len(r.response_ids) + 1 for r in rollouts]
    stats = assemble(critic, rollouts, values=values)
    # After a response of full length no position is left: its score stays on its last token.
    counts = [min(len(r.response_ids) + 1, longest) for r in rollouts]
    assert critic._experience.mask_BT.sum(1).tolist() == counts
    assert critic._mini_batch_tokens == [sum(counts)]
    assert stats.reward_total == pytest.approx(sum(SCORES))
    # Without KL, discount and trace below 1 every return is the score.
    for row, score in enumerate(SCORES):
        assert critic._experience.returns_BT[row, : counts[row]].tolist() == pytest.approx(
            [score] * counts[row]
        )
    losses = []
    for _ in range(4):
        assemble(critic, rollouts, values=values)
        losses.append(critic.learn(0.0, 1.0).metrics["loss/value_avg"])
    assert losses[-1] < losses[0]
    policy = make_learner(PolicyLearner, **sections)
    stats = assemble(policy, rollouts, values=values)
    assert stats.num_tokens == sum(len(r.response_ids) for r in rollouts)
    assert policy._experience.mask_BT.sum() == stats.num_tokens
    policy.learn(0.0, 1.0)


def test_functions_of_the_users_own_are_called(
    make_learner: MakeLearner, rollouts: list[Rollout], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def ones(rewards_BT, mask_BT, gamma):\n"
        "    return torch.full(mask_BT.shape, gamma)\n"
        "def half(logprobs, old_logprobs, advantages, mask, num_tokens, **options):\n"
        "    from rlhf_ray.algorithms.losses import policy_loss\n"
        "    loss, stats = policy_loss(logprobs, old_logprobs, advantages, mask,\n"
        "                              num_tokens=num_tokens, **options)\n"
        "    return loss / 2, stats\n"
    )
    ppo = {"advantage": f"{tmp_path}/mine.py:ones", "gamma": 0.5, "mini_batch_size": 8}
    learner = make_learner(PolicyLearner, ppo=ppo)
    assemble(learner, rollouts)
    assert advantage_of_rows(learner) == [0.5] * 8
    assert learner.learn(0.0, 1.0).metrics["loss/policy_avg"] == pytest.approx(-0.5, rel=1e-4)
    learner = make_learner(PolicyLearner, ppo=ppo | {"policy_loss": f"{tmp_path}/mine.py:half"})
    assemble(learner, rollouts)
    assert learner.learn(0.0, 1.0).metrics["loss/policy_avg"] == pytest.approx(-0.25, rel=1e-4)
    with pytest.raises(ConfigError, match=r"ppo\.advantage: .*mine\.py has no function twos"):
        make_learner(PolicyLearner, ppo=ppo | {"advantage": f"{tmp_path}/mine.py:twos"})


@pytest.mark.parametrize(
    ("ppo", "message"),
    [
        ({"advantage": "rloo"}, r"ppo\.samples_per_prompt is 1; set it to 2 or more"),
        ({"advantage": "gea"}, r"'gea' is not an estimator: it must be gae, reinforce, rloo"),
        (
            {"policy_loss": "clipp"},
            r"'clipp' is not a loss: it must be clip, gspo, cispo or module:name",
        ),
        ({"policy_loss": "cispo", "dual_clip": 3.0}, r"dual_clip 3 has no effect .* cispo"),
        ({"advantage": "dr_grpo"}, r"ppo\.samples_per_prompt is 1; set it to 2 or more"),
        ({"importance_level": "sequence"}, r"sequence has no effect .* set ppo\.importance_cap"),
        ({"importance_mask": {"level": "token"}}, r"ppo\.importance_mask\.high.*required"),
        ({"importance_mask": {"low": 2.0, "high": 3.0}}, r"ppo\.importance_mask\.low"),
        ({"importance_mask": {"low": 1.0, "high": 1.0}}, r"whatever is not exactly 1"),
        ({"kl_target_per_token": 0.1}, r"both control ppo\.kl_coef; set one of them to null"),
        ({"kl_in": "loss"}, r"kl_estimator k1 has no effect.*set ppo\.kl_estimator to k2"),
    ],
)
def test_what_cannot_work_is_refused(
    make_config: Callable[..., Any], ppo: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(ppo=ppo)
