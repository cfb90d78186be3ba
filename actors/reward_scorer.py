"""The reward scorer: hosts the reward sources, each of which scores whole responses."""

import math
from collections.abc import Callable, Mapping, Sequence

from rlhf_ray.config.rewards import SourceConfig
from rlhf_ray.errors import DivergenceError
from rlhf_ray.rewards.source import Source, together
from rlhf_ray.types import RawScores, Rollout


class RewardScorer:
    """Scores shards with all sources at once; several shards may be in progress."""

    def __init__(
        self,
        name: str,
        settings: Sequence[SourceConfig],
        make_sources: Callable[[], Mapping[str, Source]],
    ) -> None:
        """
        Args:
            name: name of this worker.
            settings: settings of the sources.
            make_sources: makes the sources, by name; `start` calls it in this process.
        """
        self._name = name
        self._settings = settings
        self._make_sources = make_sources
        self._sources: Mapping[str, Source] = {}

    def __repr__(self) -> str:
        return self._name

    def start(self) -> None:
        """Make the sources, which loads their models and functions."""
        self._sources = self._make_sources()

    async def score(self, rollouts: Sequence[Rollout]) -> RawScores:
        """Return the raw score of each response from every source.

        Raises:
            DivergenceError: a score is NaN or infinite, and on_bad_score is not skip.
            RlhfError: raised by a source.
        """
        columns = await together(
            self._sources[setting.name].score(rollouts) for setting in self._settings
        )
        return {
            setting.name: tuple(_finite(setting, rollouts, column))
            for setting, column in zip(self._settings, columns, strict=True)
        }


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
