"""The metrics of an iteration, and the summary of a run."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from statistics import fmean, pstdev
from typing import Any

from rlhf_ray.algorithms.whitening import Moments
from rlhf_ray.config.ppo import PpoConfig
from rlhf_ray.config.rewards import SourceConfig
from rlhf_ray.driver.checkpoint import PlainMoments, RunState
from rlhf_ray.driver.guards import GUARDS
from rlhf_ray.errors import DivergenceError
from rlhf_ray.rewards.combine import combine, raw_sums
from rlhf_ray.types import (
    AssembledStats,
    GeneratorsReport,
    RawScores,
    ScoredShard,
    ShardInfo,
    StepReport,
)


def joined(parts: Sequence[RawScores]) -> RawScores:
    """Concatenate the raw scores of several shards, in the order given."""
    return {name: tuple(chain.from_iterable(part[name] for part in parts)) for name in parts[0]}


def with_scores(
    batch: Sequence[ScoredShard],
    sources: Sequence[SourceConfig],
    moments: PlainMoments,
    missing_eos_penalty: float = 0.0,
    of_length: Callable[[int], float] | None = None,
) -> tuple[list[ScoredShard], PlainMoments]:
    """Fill in the combined scores of a batch in prompt order; return it with the new moments.

    The missing-EOS penalty is subtracted last, from the combined score of each response that was
    cut off, and with it ``of_length`` of each response's length. So they do not change any source's
    moments, clip or raw score, and a response without a score gets them as well.

    Raises:
        DivergenceError: no source scored any response.
    """
    known = {name: Moments(*values) for name, values in moments.items()}
    combined = combine(sources, joined([scored.raw_scores for scored in batch]), known)
    scores = iter(combined.scores)

    def shaped(info: ShardInfo) -> tuple[float, ...]:
        penalties = {True: 0.0, False: missing_eos_penalty}
        own = [next(scores) - penalties[stopped] for stopped in info.stopped]
        if of_length is not None:
            own = [
                score - of_length(num)
                for score, num in zip(own, info.response_lengths, strict=True)
            ]
        return tuple(own)

    filled = [replace(scored, scores=shaped(scored.shard.info)) for scored in batch]
    plain = {
        name: (known.count, known.total, known.total_sq) for name, known in combined.moments.items()
    }
    return filled, plain


def score_metrics(sources: Sequence[SourceConfig], raw: RawScores) -> dict[str, float]:
    """Return metrics of a batch's raw scores: of their weighted sum, and of each source."""
    sums = [value for value in raw_sums(sources, raw) if value is not None]
    metrics = {"objective/scores": fmean(sums), "objective/scores_std": pstdev(sums)}
    for name, scores in raw.items():
        known = [score for score in scores if score is not None]
        if known:
            metrics[f"objective/scores/{name}"] = fmean(known)
        metrics[f"objective/missing/{name}"] = float(len(scores) - len(known))
    return metrics


def mean_score(sums: Sequence[float | None]) -> float:
    """Return the mean over the responses that have a score."""
    known = [value for value in sums if value is not None]
    if not known:
        raise DivergenceError(
            f"No source of rewards has a score for any of the {len(sums)} held-out responses; look "
            "at what the sources answer, and that the held-out prompts have the columns they read"
        )
    return fmean(known)


EDGE = 5
"""Number of iterations in the summary's first and last means."""


def iteration_metrics(
    sources: Sequence[SourceConfig],
    batch: Sequence[ScoredShard],
    stats: AssembledStats,
    reports: Sequence[StepReport],
    kl_coef: float,
    version: int,
) -> dict[str, float]:
    """Return the metrics of one iteration, except its times, by registered name."""
    lengths = [length for scored in batch for length in scored.shard.info.response_lengths]
    stopped = [stop for scored in batch for stop in scored.shard.info.stopped]
    repeating = [repeats for scored in batch for repeats in scored.shard.info.repeating]
    distinct = [share for scored in batch for share in scored.shard.info.distinct_bigrams]
    versions = [sampled for scored in batch for sampled in scored.shard.info.versions]
    gaps = [scored.mismatch for scored in batch]
    return {
        **score_metrics(sources, joined([scored.raw_scores for scored in batch])),
        "response_length/mean": fmean(lengths),
        "response_length/max": float(max(lengths)),
        "response_length/eos_share": fmean(stopped),
        "response/repeating_share": fmean(repeating),
        "response/distinct_bigrams": fmean(distinct),
        "sampler/gap_mean": sum(g.mean * g.num_tokens for g in gaps)
        / sum(g.num_tokens for g in gaps),
        "sampler/gap_max": max(gap.largest for gap in gaps),
        "rollout/staleness": float(version - min(versions)),
        **learning_metrics(batch, stats, reports, kl_coef),
    }


def learning_metrics(
    batch: Sequence[ScoredShard],
    stats: AssembledStats,
    reports: Sequence[StepReport],
    kl_coef: float,
) -> dict[str, float]:
    """Return the metrics of a batch's learning step, which a replay gives again."""
    learnt_from = sum(score for scored in batch for score in scored.scores)
    metrics = {
        "objective/kl": stats.kl_total / stats.num_samples,
        "objective/kl_per_token": stats.kl_total / stats.num_tokens,
        "objective/kl_coef": kl_coef,
        "objective/non_score_reward": (stats.reward_total - learnt_from) / stats.num_samples,
        "objective/rlhf_reward": stats.reward_total / stats.num_samples,
        "objective/entropy": stats.neg_logprob_sum / stats.num_tokens,
    }
    for report in reports:
        metrics |= report.metrics
    return metrics


def pace_metrics(
    stats: AssembledStats, seconds: float, gpu_hour_price: float | None, num_gpus: float
) -> dict[str, float]:
    """Return time, throughput and cost of an iteration, by registered name."""
    cost = {}
    if gpu_hour_price is not None:
        per_sample = gpu_hour_price * num_gpus * seconds / 3600 / stats.num_samples
        cost = {"cost/per_1000_samples": 1000 * per_sample}
    return cost | {
        "timing_s/iteration": seconds,
        "throughput/episodes_per_s": stats.num_samples / seconds,
        "throughput/tokens_per_s": stats.num_tokens / seconds,
    }


def generator_metrics(report: GeneratorsReport, state: RunState) -> dict[str, float]:
    """Return the generators' metrics; ``state`` also counts what earlier processes did."""
    return {
        "generators/ready": report.ready,
        "generators/target": report.target,
        "generators/queue_depth": report.idle.queue_depth,
        "generators/idle_share": report.idle.generators,
        "generators/restarts": state.generator_restarts,
        "generators/requeued": state.samples_requeued,
        "generators/reissued": state.samples_reissued,
    }


def run_summary(
    history: Sequence[Mapping[str, float | None]],
    state: Mapping[str, Any],
    warnings: Sequence[Mapping[str, object]],
) -> dict[str, object]:
    """Return the contents of ``ppo/summary.json``.

    A metric that was not finite is null in the history, and lines may be missing: what is known
    counts, and a mean of nothing is null.
    """

    def mean(name: str, part: slice) -> float | None:
        known = [value for record in history[part] if (value := record.get(name)) is not None]
        return fmean(known) if known else None

    def summed(name: str) -> float:
        return sum(record.get(name) or 0.0 for record in history)

    first, last = slice(0, EDGE), slice(-EDGE, None)
    phases = ("gen", "score", "learn", "commit", "sync", "save")
    seconds = {phase: summed(f"timing_s/{phase}") for phase in phases}
    total = summed("timing_s/iteration")
    return {
        "iterations": state["iteration"],
        "episodes": state["samples_learnt"],
        "episodes_per_s": state["samples_learnt"] / total if total else None,
        "reward_first": mean("objective/scores", first),
        "reward_last": mean("objective/scores", last),
        "kl_last": mean("objective/kl", last),
        "samples_generated": state["samples_generated"],
        "samples_learnt": state["samples_learnt"],
        "samples_set_aside": state["samples_set_aside"],
        "samples_filtered": state["samples_filtered"],
        "samples_requeued": state["samples_requeued"],
        "generator_restarts": state["generator_restarts"],
        "adapter_version": state["version"],
        "best_eval_score": state["best_score"],
        "guards": dict.fromkeys(GUARDS, 0) | Counter(record["guard"] for record in warnings),
        "seconds": seconds | {"total": total},
    }


def num_stepped_on(
    num_samples: int, metrics: Mapping[str, float], ppo: PpoConfig, iteration: int
) -> int:
    """Return the samples of the policy's steps, without those of steps that float16 skipped.

    The KL coefficient adapts by them: to samples that could not move the policy it must not.
    """
    if iteration <= ppo.critic_warmup:
        return 0
    skipped = metrics.get("policy/steps_skipped", 0.0) * ppo.mini_batch_size / ppo.epochs
    return num_samples - round(skipped)
