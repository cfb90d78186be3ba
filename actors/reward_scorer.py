"""The reward scorer: a reward model that rates whole responses."""

from collections.abc import Sequence

import numpy as np
import torch

from rlhf_ray.algorithms.batching import micro_batches
from rlhf_ray.algorithms.experience import pad
from rlhf_ray.config import Config
from rlhf_ray.models.forward import sequence_of
from rlhf_ray.models.heads import sequence_scores
from rlhf_ray.models.loading import load_sequence_classifier, load_tokenizer
from rlhf_ray.types import Rollout


class RewardScorer:
    """Scores by a sequence-classification model, frozen.

    A model with the policy's tokenizer reads the rollout's own token ids; one with another
    tokenizer reads the decoded text.
    """

    def __init__(self, name: str, config: Config, model_path: str, policy_path: str) -> None:
        self._name = name
        self._max_tokens = config.ppo.max_tokens_per_micro_batch
        self._max_length = config.model.max_length
        self._baseline = config.reward.baseline
        self._model = load_sequence_classifier(model_path, config.model, require_head=True)
        if torch.cuda.is_available():
            self._model.cuda()
        self._tokenizer = load_tokenizer(model_path)
        policy_tokenizer = load_tokenizer(policy_path)
        self._same_tokens = self._tokenizer.get_vocab() == policy_tokenizer.get_vocab()

    def __repr__(self) -> str:
        return self._name

    def start(self) -> None:
        """Ready as soon as it is made."""

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout]) -> tuple[float, ...]:
        """[N] score minus reward.baseline of each response.

        A response cut at the length limit is scored as it stands, without an end of sequence.
        """
        sequences = [self._tokens(rollout) for rollout in rollouts]
        scores = [0.0] * len(rollouts)
        for rows in micro_batches([len(sequence) for sequence in sequences], self._max_tokens):
            ids_BS, attention_BS = pad([sequences[row] for row in rows])
            device = self._model.device
            result_B = sequence_scores(self._model, ids_BS.to(device), attention_BS.to(device))
            for row, score in zip(rows, result_B.tolist(), strict=True):
                scores[row] = score - self._baseline
        return tuple(scores)

    def _tokens(self, rollout: Rollout) -> np.ndarray:
        if self._same_tokens:
            return sequence_of(rollout)
        ids = self._tokenizer(rollout.prompt.text + rollout.text, add_special_tokens=False)[
            "input_ids"
        ][: self._max_length - 1]
        end = [self._tokenizer.eos_token_id] if rollout.finish_reason == "stop" else []
        return np.asarray([*ids, *end], dtype=np.int64)
