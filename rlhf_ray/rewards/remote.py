"""A reward server that speaks OpenRLHF's protocol.

Request: ``{"query": [prompt + response, ...], "prompts": [...], "labels": [...]}``; answer:
``{"rewards": [number, ...]}``.
"""

from collections.abc import Sequence
from typing import Any

from rlhf_ray.config.rewards import RemoteSourceConfig
from rlhf_ray.errors import RlhfError
from rlhf_ray.rewards.functions import as_scores, openrlhf_arguments
from rlhf_ray.rewards.http import Endpoint
from rlhf_ray.types import Rollout


class RemoteSource:
    """Rates by a service, several responses a request."""

    def __init__(self, config: RemoteSourceConfig) -> None:
        self._config = config
        self._endpoint = Endpoint(f"rewards: {config.name}", config.url, config)

    async def score(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """[N] what the server says.

        Raises:
            RlhfError: it refused, stayed down, or answered something else than scores.
        """
        size = self._config.batch_size
        batches = [rollouts[start : start + size] for start in range(0, len(rollouts), size)]
        answers = await self._endpoint.post_all([self._body(batch) for batch in batches])
        pairs = zip(answers, batches, strict=True)
        return [score for answer, batch in pairs for score in self._scores(answer, len(batch))]

    def _body(self, rollouts: Sequence[Rollout]) -> dict[str, Any]:
        queries, prompts, labels = openrlhf_arguments(rollouts, self._config.label_column)
        return {"query": queries, "prompts": prompts, "labels": labels}

    def _scores(self, answer: Any, count: int) -> list[float | None]:
        config = self._config
        if not isinstance(answer, dict) or "rewards" not in answer:
            raise RlhfError(
                f"rewards: {config.name}: {config.url} answered {str(answer)[:200]}, expected an "
                'object with "rewards"; name the address of a server of OpenRLHF\'s protocol'
            )
        return as_scores(answer["rewards"], count, f"rewards: {config.name}: {config.url}")
