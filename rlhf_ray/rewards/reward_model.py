"""A reward model: the score at the end of prompt and response."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhf_ray.errors import DataError
from rlhf_ray.models.forward import sequence_of
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

    def __init__(
        self, scorer: SequenceScorer, tokenizer: Any, same_tokens: bool, max_length: int
    ) -> None:
        """
        Args:
            scorer: the engine.
            tokenizer: the reward model's.
            same_tokens: whether it is the policy's as well.
            max_length: longest text, tokens.
        """
        self._scorer = scorer
        self._tokenizer = tokenizer
        self._same_tokens = same_tokens
        self._max_length = max_length
        self._blocking = Blocking()

    async def score(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """[N] scores. A response that was cut at its limit gets no end of sequence."""
        sequences = [self._tokens(rollout) for rollout in rollouts]
        return [*await self._blocking(self._scorer, sequences)]

    def _tokens(self, rollout: Rollout) -> np.ndarray:
        if self._same_tokens:
            return sequence_of(rollout)
        messages = messages_of(rollout.prompt)
        ids = self._text_ids(rollout) if messages is None else self._chat_ids(messages, rollout)
        return np.asarray(ids[-self._max_length :], dtype=np.int64)

    def _text_ids(self, rollout: Rollout) -> list[int]:
        text = rollout.prompt.text + rollout.text
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [*ids, self._tokenizer.eos_token_id] if rollout.finish_reason == "stop" else ids

    def _chat_ids(self, messages: Sequence[Any], rollout: Rollout) -> list[int]:
        if not self._tokenizer.chat_template:
            raise DataError(
                f"Prompt {rollout.prompt.id} is a chat, and the reward model has another tokenizer "
                "than the policy and no chat template to read it by; set chat_template in its "
                "tokenizer_config.json, or take a reward model with the policy's tokenizer"
            )
        chat = [*messages, {"role": "assistant", "content": rollout.text}]
        return self._tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
