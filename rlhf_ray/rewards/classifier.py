"""A text classifier: the logit of one of its labels."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.source import Blocking
from rlhf_ray.types import Rollout

TextClassifier = Callable[[Sequence[str]], list[Mapping[str, float]]]
"""The engine: [N] texts -> for each, label -> logit."""


class ClassifierSource:
    """Rates by a text-classification model."""

    def __init__(
        self,
        name: str,
        classify: TextClassifier,
        label: str,
        reads: Literal["conversation", "response"],
    ) -> None:
        """
        Args:
            name: of the source.
            classify: the engine.
            label: whose logit is the score, in any case of letters.
            reads: what it is shown.
        """
        self._name = name
        self._classify = classify
        self._label = label
        self._reads = reads
        self._blocking = Blocking()

    async def score(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """[N] logits of the label, whatever place it has among the model's labels.

        Raises:
            ConfigError: the model has no such label.
        """
        texts = [
            rollout.text if self._reads == "response" else rollout.prompt.text + rollout.text
            for rollout in rollouts
        ]
        return [self._logit(logits) for logits in await self._blocking(self._classify, texts)]

    def _logit(self, logits: Mapping[str, float]) -> float:
        for label, logit in logits.items():
            if label.lower() == self._label.lower():
                return logit
        raise ConfigError(
            f"rewards: {self._name} has no label {self._label!r}; its labels are "
            f"{', '.join(logits)}: name one of them in label"
        )
