"""The frozen reference: log-probs of the model that the policy is held close to."""

from collections.abc import Sequence

import numpy as np

from rlhf_ray.algorithms.logprobs import sampling_rule
from rlhf_ray.config import Config
from rlhf_ray.models.forward import response_logprobs
from rlhf_ray.models.loading import load_causal_lm, on_device
from rlhf_ray.models.stop_conditions import stop_token_ids
from rlhf_ray.models.token_logprobs import answer_with_logprobs
from rlhf_ray.types import Rollout


class Reference:
    """The SFT model, frozen in a process of its own."""

    def __init__(self, name: str, config: Config, model_path: str) -> None:
        self._name = name
        self._rule = sampling_rule(
            config.rollout, stop_token_ids(model_path, config.template, config.model)
        )
        self._max_tokens = config.ppo.max_tokens_per_micro_batch
        model = answer_with_logprobs(load_causal_lm(model_path, config.model, quantized=True))
        self._model = on_device(model)

    def __repr__(self) -> str:
        return self._name

    def start(self) -> None:
        """Do nothing: the constructor has loaded the model."""

    def logprobs(self, rollouts: Sequence[Rollout]) -> tuple[list[np.ndarray], None]:
        """Return [T] fp32 log-probs of each response's tokens, under the sampling rule."""
        logprobs = response_logprobs(
            self._model,
            rollouts,
            rule=self._rule,
            max_tokens=self._max_tokens,
            device=self._model.device,
        )
        return logprobs, None
