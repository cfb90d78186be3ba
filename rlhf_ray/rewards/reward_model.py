"""A reward model: the score at the end of prompt and response."""

from collections.abc import Callable, Sequence

import numpy as np

from rlhf_ray.data.reading.counts import BadRow
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.errors import DataError
from rlhf_ray.rewards.source import Blocking, messages_of
from rlhf_ray.types import Rollout

SequenceScorer = Callable[[Sequence[np.ndarray]], list[float]]
"""The engine: [N] sequences of [S] token ids -> [N] scores."""


class ModelSource:
    """Rates by a sequence-classification model with one label.

    One with the policy's tokenizer reads the rollout's own token ids. Another one reads the
    messages by its own chat template, or the text where the prompt is no chat; of what is longer
    than it may be, it reads the end.
    """

    def __init__(self, scorer: SequenceScorer, renderer: Renderer | None, max_length: int) -> None:
        """
        Args:
            scorer: the engine.
            renderer: of the reward model's tokenizer; None: it is the policy's.
            max_length: longest text, tokens.
        """
        self._scorer = scorer
        self._renderer = renderer
        self._max_length = max_length
        self._blocking = Blocking()

    async def score(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """[N] scores. A response that was cut at its limit gets no end of sequence.

        Raises:
            DataError: a prompt is a chat that the model's tokenizer cannot render.
        """
        sequences = [self._tokens(rollout) for rollout in rollouts]
        return [*await self._blocking(self._scorer, sequences)]

    def _tokens(self, rollout: Rollout) -> np.ndarray:
        if self._renderer is None:
            return rollout.sequence_ids
        prompt = rollout.prompt
        ended = rollout.finish_reason == "stop"
        try:
            rendered = self._renderer.full(messages_of(prompt) or prompt.text, rollout.text, ended)
        except BadRow as bad:
            raise DataError(
                f"Prompt {prompt.id} cannot be shown to the reward model, whose tokenizer is not "
                f"the policy's ({bad.reason}): {bad.explanation}"
            ) from bad
        return np.asarray(rendered.token_ids[-self._max_length :], dtype=np.int64)
