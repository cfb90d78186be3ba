"""The driver's part in rewards: sources are combined over the whole batch, in prompt order."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from statistics import fmean, pstdev

from rlhf_ray.algorithms.whitening import Moments
from rlhf_ray.config.rewards import SourceConfig
from rlhf_ray.errors import DivergenceError
from rlhf_ray.rewards.combine import combine, raw_sums
from rlhf_ray.types import RawScores, ScoredShard

PlainMoments = Mapping[str, Sequence[float]]
"""Source -> count, sum, sum of squares of its raw scores so far, as a commit keeps them."""


def joined(parts: Sequence[RawScores]) -> RawScores:
    """The raw scores of several shards as those of one, in the order given."""
    return {name: tuple(chain.from_iterable(part[name] for part in parts)) for name in parts[0]}


def with_scores(
    batch: Sequence[ScoredShard],
    sources: Sequence[SourceConfig],
    moments: PlainMoments,
    missing_eos_penalty: float = 0.0,
) -> tuple[list[ScoredShard], PlainMoments]:
    """A whole batch, in prompt order, with what is learnt from; and the moments after it.

    The penalty comes last, off the combined score of each response that did not end by itself:
    no source's moments, clip or raw score know of it, and one without a score gets it as well.

    Raises:
        DivergenceError: no source scored any response.
    """
    known = {name: Moments(*values) for name, values in moments.items()}
    combined = combine(sources, joined([scored.raw_scores for scored in batch]), known)
    scores = iter(combined.scores)
    penalties = {True: 0.0, False: missing_eos_penalty}
    filled = [
        replace(
            scored,
            scores=tuple(
                next(scores) - penalties[stopped] for stopped in scored.shard.info.stopped
            ),
        )
        for scored in batch
    ]
    plain = {
        name: (known.count, known.total, known.total_sq) for name, known in combined.moments.items()
    }
    return filled, plain


def score_metrics(sources: Sequence[SourceConfig], raw: RawScores) -> dict[str, float]:
    """Raw scores of a batch, by registered name: their weighted sum, and each source's own."""
    sums = [value for value in raw_sums(sources, raw) if value is not None]
    metrics = {"objective/scores": fmean(sums), "objective/scores_std": pstdev(sums)}
    for name, scores in raw.items():
        known = [score for score in scores if score is not None]
        if known:
            metrics[f"objective/scores/{name}"] = fmean(known)
        metrics[f"objective/missing/{name}"] = float(len(scores) - len(known))
    return metrics


def mean_score(sums: Sequence[float | None]) -> float:
    """Mean over the responses that a source scored.

    Raises:
        DivergenceError: there are none.
    """
    known = [value for value in sums if value is not None]
    if not known:
        raise DivergenceError(
            f"No source of rewards has a score for any of the {len(sums)} held-out responses; look "
            "at what the sources answer, and that the held-out prompts have the columns they read"
        )
    return fmean(known)
