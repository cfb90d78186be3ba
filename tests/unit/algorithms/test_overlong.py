"""Tests of what becomes of long responses and of those that are cut off."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_ray.algorithms.advantages import resolve
from rlhf_ray.algorithms.experience import Assembler, Collected
from rlhf_ray.algorithms.rewards import length_penalty
from rlhf_ray.algorithms.token_weights import corrected
from rlhf_ray.config.overlong import OverlongConfig
from rlhf_ray.config.ppo import PpoConfig

# Three responses of 2 tokens; values with one more, of the state behind them.
TOKENS = [np.array([5, 6])] * 3
OLD = [np.array([-1.0, -2.0], np.float32)] * 3
VALUES = [np.array(row, np.float32) for row in ([0.5, 1.0, 2.0], [0.5, 1.0, 4.0], [0.0, 0.0, 8.0])]
BATCH = Collected(
    sequences=[np.array([4, 5, 6])] * 3,
    prompt_lengths=[1] * 3,
    responses=TOKENS,
    rollout_logprobs=OLD,
    old_logprobs=OLD,
    ref_logprobs=OLD,
    values=VALUES,
    scores_B=torch.tensor([10.0, 10.0, 10.0]),
    cut_off=[True, False, True],
)


def assembler(**options: Any) -> Assembler:
    return Assembler(
        estimator=resolve("gae"),
        gamma=0.5,
        lam=1.0,
        group_size=1,
        kl_kind="k1",
        kl_in="reward",
        position="last_token",
        max_tokens=4,
        **options,
    )


@pytest.mark.parametrize(
    ("length", "punishment"),
    [(1, 0.0), (60, 0.0), (70, 0.25), (80, 0.5), (100, 1.0), (120, 1.0)],
)
def test_the_soft_punishment_by_hand(length: int, punishment: float) -> None:
    """DAPO: ((L_max - L_cache) - length) / L_cache between the two, -1 beyond; here 100 and 40."""
    overlong = OverlongConfig(buffer=40)
    assert length_penalty(overlong, 100, length) == pytest.approx(punishment)
    twice = OverlongConfig(buffer=40, penalty=2.0, per_token=0.01)
    assert length_penalty(twice, 100, length) == pytest.approx(2 * punishment + 0.01 * length)
    assert length_penalty(OverlongConfig(), 100, length) == 0


def test_the_value_behind_a_response_replaces_the_score_where_it_was_cut_off() -> None:
    whole = assembler(bootstraps=True)(BATCH, kl_coef=0.0)
    # gamma .5, lambda 1: returns are .5 times what comes; it is .5 * 2, 10 and .5 * 8 at the end.
    returns = [[0.5, 1.0], [5.0, 10.0], [2.0, 4.0]]
    torch.testing.assert_close(whole.experience.returns_BT, torch.tensor(returns))
    advantages = [[0.0, 0.0], [4.5, 9.0], [2.0, 4.0]]
    torch.testing.assert_close(whole.experience.advantages_BT, torch.tensor(advantages))
    assert whole.rewards_BT.tolist() == [[0, 10]] * 3, "the rewards that are logged are the scores"


def test_a_value_behind_the_last_token_is_ignored_without_bootstrapping() -> None:
    plain = replace(BATCH, values=[row[:2] for row in VALUES], cut_off=())
    for field in ("returns_BT", "advantages_BT"):
        ours = getattr(assembler()(BATCH, 0.0).experience, field)
        torch.testing.assert_close(ours, getattr(assembler()(plain, 0.0).experience, field))


def test_what_is_cut_off_is_left_out_of_the_loss_but_not_of_the_batch() -> None:
    whole = assembler()(BATCH, kl_coef=0.0)
    for truncated, rows in (("score", [1, 1, 1]), ("mask", [0, 1, 0])):
        ppo = PpoConfig(mini_batch_size=3, overlong=OverlongConfig(truncated=truncated))
        batch, metrics = corrected(whole.experience, ppo, whole.cut_off_B)
        assert batch.kept_BT.tolist() == [[bool(row)] * 2 for row in rows]
        # Of 6 tokens two or six count: their mean is the loss.
        weight = 6 / (2 * sum(rows))
        expected = [[weight * row] * 2 for row in rows]
        assert batch.weighted(ppo, 4).weights_BT.tolist() == pytest.approx(np.array(expected))
        assert batch.num_tokens == 6
        assert not metrics
