"""The likelihood of given answers under any adapter of one base, for evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_ray.config import Config
from rlhf_ray.engines.served_adapters import tensors_from_bytes
from rlhf_ray.models.adapters import AdapterSlot
from rlhf_ray.models.forward import response_logprobs
from rlhf_ray.models.loading import load_causal_lm, on_device
from rlhf_ray.models.token_logprobs import PLAIN, answer_with_logprobs
from rlhf_ray.types import Rollout


class Likelihood:
    """The frozen SFT model with one adapter at a time."""

    def __init__(self, name: str, config: Config, model_path: str) -> None:
        self._name = name
        self._config = config
        self._model_path = model_path

    def __repr__(self) -> str:
        return self._name

    def start(self) -> None:
        """Load the model."""
        model = load_causal_lm(self._model_path, self._config.model, quantized=True)
        self._slot = AdapterSlot(on_device(answer_with_logprobs(model)))

    def hold(self, peft_config: Mapping[str, Any], tensors: bytes) -> None:
        """Replace the adapter by that of a PEFT config and safetensors bytes."""
        self._slot.put(peft_config, tensors_from_bytes(tensors))

    def loss(self, answers: Sequence[Rollout]) -> tuple[float, int]:
        """Return the summed loss of the answers' tokens, in nats, and the number of tokens.

        The distribution is the model's own (temperature 1, all tokens), not the run's sampling
        rule, so that perplexities of runs with different settings can be compared.
        """
        logprobs = response_logprobs(
            self._slot.model,
            answers,
            rule=PLAIN,
            max_tokens=self._config.ppo.max_tokens_per_micro_batch,
            device=self._slot.model.device,
        )
        return -float(sum(row.sum(dtype=np.float64) for row in logprobs)), sum(map(len, logprobs))
