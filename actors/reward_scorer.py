"""The reward scorer: hosts the reward sources, each of which scores whole responses."""

import math
from collections.abc import Callable, Mapping, Sequence

from rlhf_ray.config.rewards import SourceConfig
from rlhf_ray.errors import ActorFailure, DivergenceError
from rlhf_ray.observability.phases import Stalled, count, while_it_moves
from rlhf_ray.rewards.source import Source, together
from rlhf_ray.types import RawScores, Rollout


class RewardScorer:
    """Scores shards with all sources at once; several shards may be in progress."""

    def __init__(
        self,
        name: str,
        settings: Sequence[SourceConfig],
        make_sources: Callable[[], Mapping[str, Source]],
        limit_s: float | None = None,
    ) -> None:
        """
        Args:
            name: name of this worker.
            settings: settings of the sources.
            make_sources: makes the sources, by name; `start` calls it in this process.
            limit_s: longest time without progress of a source, within that of the whole call.
        """
        self._name = name
        self._settings = settings
        self._make_sources = make_sources
        self._limit_s = limit_s
        self._sources: Mapping[str, Source] = {}

    def __repr__(self) -> str:
        return self._name

    def start(self) -> None:
        """Make the sources, which loads their models and functions, if they are not there."""
        self._sources = self._sources or self._make_sources()

    async def score(self, rollouts: Sequence[Rollout]) -> RawScores:
        """Return the raw score of each response from every source.

        Raises:
            DivergenceError: a score is NaN or infinite, and on_bad_score is not skip.
            RlhfError: raised by a source.
            ActorFailure: a source hangs, which another process may cure.
        """
        columns = await together(self._scores(setting.name, rollouts) for setting in self._settings)
        return {
            setting.name: tuple(_finite(setting, rollouts, column))
            for setting, column in zip(self._settings, columns, strict=True)
        }

    async def _scores(self, name: str, rollouts: Sequence[Rollout]) -> list[float | None]:
        key = "its part of cluster.call_timeout_s"
        try:
            scores = await while_it_moves(self._sources[name].score(rollouts), self._limit_s, key)
        except Stalled as stalled:
            raise ActorFailure(
                f"rewards: {name} did not score a shard of {len(rollouts)} responses {stalled}. "
                "Raise cluster.call_timeout_s, or lower rollout.shard_size or the source's own "
                "timeouts; then run again: the run resumes at its last commit"
            ) from None
        count(len(rollouts), f"responses scored by {name}")
        return scores


def _finite(
    setting: SourceConfig, rollouts: Sequence[Rollout], scores: Sequence[float | None]
) -> Sequence[float | None]:
    for rollout, score in zip(rollouts, scores, strict=True):
        if score is None or math.isfinite(score) or setting.on_bad_score == "skip":
            continue
        raise DivergenceError(
            f"rewards: {setting.name} scored the response to prompt {rollout.prompt.id} {score}; "
            f"nothing can be learnt from that. Fix the source, or set on_bad_score: skip to count "
            f"such a score as missing. The response: {rollout.text[:200]!r}"
        )
    return [None if score is None or not math.isfinite(score) else score for score in scores]
