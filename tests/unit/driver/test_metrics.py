from dataclasses import asdict
from typing import Any

import pytest

from rlhf_ray.config import Config
from rlhf_ray.config.ppo import PpoConfig
from rlhf_ray.config.rewards import RougeSourceConfig
from rlhf_ray.driver.checkpoint import RunState
from rlhf_ray.driver.metrics import (
    iteration_metrics,
    joined,
    num_stepped_on,
    pace_metrics,
    run_summary,
    score_metrics,
    with_scores,
)
from rlhf_ray.observability.metrics import check
from rlhf_ray.types import (
    AssembledStats,
    Mismatch,
    RawScores,
    ScoredShard,
    Shard,
    ShardInfo,
    StepReport,
)


def shard(
    index: int, scores: tuple[float, ...], lengths: tuple[int, ...], gap: float
) -> ScoredShard:
    stopped = tuple(length < 8 for length in lengths)
    info = ShardInfo(
        index=index,
        positions=tuple(range(len(scores))),
        response_lengths=lengths,
        stopped=stopped,
        versions=(4 - index,) * len(scores),
        repeating=tuple(length > 6 for length in lengths),
        distinct_bigrams=tuple(2 / length for length in lengths),
    )
    gaps = Mismatch(gap, 2 * gap, sum(lengths))
    return ScoredShard(Shard(info, None), {"model": scores}, None, None, None, gaps, scores)


def test_an_iteration_in_numbers() -> None:
    batch = [shard(0, (1.0, 3.0), (2, 8), 0.01), shard(1, (5.0,), (5,), 0.04)]
    stats = AssembledStats(
        num_samples=3,
        num_tokens=15,
        advantage_total=0.0,
        advantage_total_sq=1.0,
        kl_total=6.0,
        reward_total=7.8,
        neg_logprob_sum=30.0,
    )
    reports = [
        StepReport({"loss/policy_avg": -0.5}, (0, 1, 2), 15),
        StepReport({"loss/value_avg": 0.25}, (0, 1, 2), 15),
    ]
    sources = Config().rewards
    metrics = iteration_metrics(sources, batch, stats, reports, kl_coef=0.2, version=5)
    metrics |= pace_metrics(stats, seconds=5.0, gpu_hour_price=18.0, num_gpus=2)
    check(metrics)  # every name is registered
    assert metrics == pytest.approx(
        {
            "objective/scores": 3.0,
            "objective/scores_std": (8 / 3) ** 0.5,  # of the batch, not of a sample of it
            "objective/scores/model": 3.0,
            "objective/missing/model": 0.0,
            "objective/kl": 2.0,  # 6 nats over 3 samples
            "objective/kl_per_token": 0.4,
            "objective/kl_coef": 0.2,
            "objective/non_score_reward": -0.4,
            "objective/rlhf_reward": 2.6,  # mean score minus .2 times 2 nats
            "objective/entropy": 2.0,  # nats a token
            "response_length/mean": 5.0,
            "response_length/max": 8.0,
            "response_length/eos_share": 2 / 3,
            "response/repeating_share": 1 / 3,  # of samples, however they are cut into shards
            "response/distinct_bigrams": (1 + 0.25 + 0.4) / 3,
            "sampler/gap_mean": 0.02,  # (10 * .01 + 5 * .04) / 15
            "sampler/gap_max": 0.08,
            "rollout/staleness": 2.0,  # version 5 learns what 4 and 3 sampled
            "cost/per_1000_samples": 1000 * 0.05 / 3,  # 36 an hour is .01 a second
            "timing_s/iteration": 5.0,
            "throughput/episodes_per_s": 0.6,
            "throughput/tokens_per_s": 3.0,
            "loss/policy_avg": -0.5,
            "loss/value_avg": 0.25,
        }
    )


def record(number: int) -> dict[str, Any]:
    phases = {f"timing_s/{name}": 0.5 for name in ("gen", "score", "learn", "commit", "sync")}
    if number == 4:  # the only one after a commit that was written to disk
        phases["timing_s/save"] = 0.25
    return {
        "iteration": number,
        "objective/scores": float(number),
        "objective/kl": 2.0 * number,
        "timing_s/iteration": 4.0,
        **phases,
    }


def test_a_run_in_numbers() -> None:
    state = RunState(
        iteration=7,
        version=7,
        samples_generated=64,
        samples_learnt=56,
        samples_set_aside=8,
        samples_requeued=3,
        generator_restarts=1,
        best_score=6.5,
    )
    warnings = [
        {"iteration": 0, "guard": "prompt_reuse"},
        {"iteration": 2, "guard": "ratio"},
        {"iteration": 3, "guard": "ratio"},
    ]
    summary = run_summary([record(number) for number in range(1, 8)], asdict(state), warnings)
    assert summary == {
        "iterations": 7,
        "episodes": 56,
        "episodes_per_s": 2.0,  # 56 in 7 times 4 seconds
        "reward_first": 3.0,  # of 1 to 5
        "reward_last": 5.0,  # of 3 to 7
        "kl_last": 10.0,
        "samples_generated": 64,
        "samples_learnt": 56,
        "samples_set_aside": 8,
        "samples_filtered": 0,
        "samples_requeued": 3,
        "generator_restarts": 1,
        "adapter_version": 7,
        "best_eval_score": 6.5,
        "guards": {
            "mismatch": 0,
            "repetition": 0,
            "negative_kl": 0,
            "ratio": 2,  # iterations
            "non_finite": 0,
            "loss_spike": 0,
            "prompt_reuse": 1,
        },
        "seconds": {
            "gen": 3.5,
            "score": 3.5,
            "learn": 3.5,
            "commit": 3.5,
            "sync": 3.5,
            "save": 0.25,
            "total": 28.0,
        },
    }


def test_a_run_of_one_iteration_has_the_same_first_and_last() -> None:
    summary = run_summary([record(1)], asdict(RunState(iteration=1, version=1)), [])
    assert summary["reward_first"] == summary["reward_last"] == 1.0


def test_a_history_with_gaps_still_has_a_summary() -> None:
    """The record of an iteration whose number was not finite holds null, and a line may be torn."""
    gaps: list[Any] = [
        {"iteration": 1, "objective/scores": None, "objective/kl": 2.0, "timing_s/iteration": None},
        {"iteration": 2, "objective/scores": 3.0, "timing_s/iteration": 4.0, "timing_s/gen": None},
        {"iteration": 3},
    ]
    state = asdict(RunState(iteration=3, version=3)) | {"samples_learnt": 8}
    summary = run_summary(gaps, state, [])
    assert (summary["reward_first"], summary["reward_last"], summary["kl_last"]) == (3.0, 3.0, 2.0)
    assert summary["episodes_per_s"] == 2.0
    assert run_summary([], state, [])["reward_last"] is None


def source(**keys: Any) -> list[RougeSourceConfig]:
    return [RougeSourceConfig(type="rouge", name="a", **keys)]


def scored_shard(
    first: int, raw: tuple[float | None, ...], stopped: tuple[bool, ...]
) -> ScoredShard:
    count = len(raw)
    positions = tuple(range(first, first + count))
    info = ShardInfo(first, positions, (1,) * count, stopped, (0,) * count)
    scores: RawScores = {"a": raw}
    return ScoredShard(Shard(info, None), scores, None, None, None, Mismatch(0.0, 0.0, count))


BATCH = [
    scored_shard(0, (1.0, 3.0), (True, False)),
    scored_shard(2, (5.0, None, 9.0), (False, False, True)),
]


def test_it_comes_off_the_score_of_those_alone() -> None:
    filled, _ = with_scores(BATCH, source(), {}, missing_eos_penalty=2.0)
    # The fourth has no score of its own: the mean of the others, 4.5, less the penalty.
    assert [scored.scores for scored in filled] == [(1.0, 1.0), (3.0, 2.5, 9.0)]


def test_it_comes_after_baseline_and_clip() -> None:
    filled, _ = with_scores(BATCH, source(baseline=3.0, clip=2.0), {}, missing_eos_penalty=5.0)
    # Clipped to -2, 0, 2, and 2, with mean .5; the penalty may take a score below the clip.
    assert [scored.scores for scored in filled] == [(-2.0, -5.0), (-3.0, -4.5, 2.0)]


def test_what_a_length_takes_off_comes_last_as_well() -> None:
    filled, _ = with_scores(BATCH, source(clip=2.0), {}, 5.0, of_length=lambda num: 0.25 * num)
    plain, _ = with_scores(BATCH, source(clip=2.0), {}, 5.0)
    for one, other in zip(filled, plain, strict=True):
        assert one.scores == pytest.approx([score - 0.25 for score in other.scores])


def test_running_moments_and_raw_scores_do_not_know_of_it() -> None:
    plain, moments = with_scores(BATCH, source(scale="running"), {})
    penalised, same = with_scores(BATCH, source(scale="running"), {}, missing_eos_penalty=5.0)
    assert moments == same == {"a": (4.0, 18.0, 116.0)}
    gone = [
        before - after
        for one, other in zip(plain, penalised, strict=True)
        for before, after in zip(one.scores, other.scores, strict=True)
    ]
    assert gone == pytest.approx([0, 5, 5, 5, 0])
    raw = joined([scored.raw_scores for scored in penalised])
    assert score_metrics(source(), raw)["objective/scores"] == 4.5


def test_the_kl_coefficient_adapts_by_samples_of_steps_alone() -> None:
    ppo = PpoConfig(batch_size=64, mini_batch_size=16, epochs=2)
    assert num_stepped_on(64, {}, ppo, 1) == 64
    assert num_stepped_on(64, {"policy/steps_skipped": 2.0}, ppo, 1) == 48
    assert num_stepped_on(64, {"policy/steps_skipped": 8.0}, ppo, 1) == 0
