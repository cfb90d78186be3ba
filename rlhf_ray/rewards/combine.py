"""Combine the raw scores of several sources into one score per response; pure functions.

    part = weight x clip((raw - baseline) / deviation);  score = sum of the parts of a response

Scaling divides by the deviation of all scores of the run so far, this batch included, without
centring (Engstrom et al. 2020, arXiv:2005.12729, section 3, there of returns): a score keeps its
sign, so a baseline keeps its meaning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from statistics import fmean

from rlhf_ray.algorithms.whitening import Moments
from rlhf_ray.config.rewards import SourceConfig
from rlhf_ray.errors import RlhfError
from rlhf_ray.types import RawScores


@dataclass(frozen=True, slots=True)
class Combined:
    """Combined scores of a batch."""

    scores: tuple[float, ...]
    """[N] scores to learn from."""
    moments: Mapping[str, Moments]
    """By source with ``scale: running``: moments of all raw scores so far, this batch included."""


def combine(
    sources: Sequence[SourceConfig], raw: RawScores, moments: Mapping[str, Moments]
) -> Combined:
    """Compute the score of each response of a batch.

    A source without a score for a response adds nothing, and the other sources keep their weights.
    A response that no source scored gets the mean of the scored ones, so it is learnt as neither
    good nor bad.

    Raises:
        RlhfError: no source scored any response.
    """
    updated = {
        source.name: moments.get(source.name, Moments()) + _moments_of(raw[source.name])
        for source in sources
        if source.scale == "running"
    }
    parts = [_parts(source, raw[source.name], updated.get(source.name)) for source in sources]
    sums = _sums(parts)
    scored = [value for value in sums if value is not None]
    if not scored:
        raise RlhfError(
            f"None of the {len(sums)} responses has a score from {', '.join(raw)}. "
            "Check what the sources answer; the run resumes at its last commit"
        )
    neutral = fmean(scored)
    return Combined(tuple(neutral if value is None else value for value in sums), updated)


def raw_sums(sources: Sequence[SourceConfig], raw: RawScores) -> list[float | None]:
    """Return [N] weighted sums of each response's raw scores; None where no source has one."""
    return _sums(
        [[_times(source.weight, score) for score in raw[source.name]] for source in sources]
    )


def _parts(
    source: SourceConfig, raw: Sequence[float | None], moments: Moments | None
) -> list[float | None]:
    """Return [N] parts that a source adds to each response's score."""
    # While all scores are equal there is nothing to scale by.
    deviation = (moments.std() if moments else 0.0) or 1.0
    limit = source.clip if source.clip is not None else float("inf")

    def part(score: float) -> float:
        scaled = (score - source.baseline) / deviation
        return source.weight * min(max(scaled, -limit), limit)

    return [None if score is None else part(score) for score in raw]


def _moments_of(raw: Sequence[float | None]) -> Moments:
    scores = [score for score in raw if score is not None]
    return Moments(float(len(scores)), fsum(scores), fsum(score * score for score in scores))


def _times(weight: float, score: float | None) -> float | None:
    return None if score is None else weight * score


def _sums(parts: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Sum each response's parts over the sources; None where no source has one."""
    columns = ([part for part in column if part is not None] for column in zip(*parts, strict=True))
    return [fsum(column) if column else None for column in columns]
