"""Padded micro-batches against a forward over each row alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_ray.algorithms.logprobs import SamplingRule
from rlhf_ray.config.model import ModelConfig
from rlhf_ray.models.forward import (
    response_logprobs,
    response_values,
)
from rlhf_ray.models.heads import ValueModel, initialise_head
from rlhf_ray.models.loading import load_causal_lm, load_sequence_classifier
from rlhf_ray.models.token_logprobs import answer_with_logprobs
from rlhf_ray.types import Prompt, Rollout

CPU = torch.device("cpu")


def rollout(position: int, prompt_length: int, response_length: int) -> Rollout:
    """A rollout of random tokens."""
    rng = np.random.default_rng(position)
    tokens = rng.integers(3, 290, prompt_length + response_length)
    response = tokens[prompt_length:].astype(np.int64)
    return Rollout(
        position=position,
        prompt=Prompt(str(position), "", tuple(tokens[:prompt_length].tolist())),
        response_ids=response,
        rollout_logprobs=np.zeros(response_length, np.float32),
        finish_reason="length",
        version=0,
        text="",
    )


ROLLOUTS = [rollout(i, *lengths) for i, lengths in enumerate([(3, 9), (12, 1), (1, 5), (7, 7)])]


@pytest.mark.parametrize("max_tokens", [1, 30, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_each_row_alone(
    base: Path, max_tokens: int, temperature: float
) -> None:
    model = answer_with_logprobs(load_causal_lm(str(base), ModelConfig()))
    found = response_logprobs(
        model,
        ROLLOUTS,
        rule=SamplingRule(temperature),
        max_tokens=max_tokens,
        device=CPU,
    )
    for row, logprobs in zip(ROLLOUTS, found, strict=True):
        ids = torch.tensor(row.sequence_ids)[None]
        with torch.no_grad():
            scaled = (model(ids).logits[0] / temperature).log_softmax(-1)
        first = len(row.prompt.token_ids)
        expected = [float(scaled[t - 1, ids[0, t]]) for t in range(first, ids.shape[1])]
        assert logprobs.dtype == np.float32
        np.testing.assert_allclose(logprobs, expected, atol=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 30, 1000])
def test_values_are_of_the_state_before_each_token(base: Path, max_tokens: int) -> None:
    classifier = load_sequence_classifier(str(base), ModelConfig(), zero_head=True)
    initialise_head(classifier, seed=0)
    model = ValueModel(classifier)
    found = response_values(model, ROLLOUTS, max_tokens=max_tokens, device=CPU)
    for row, values in zip(ROLLOUTS, found, strict=True):
        ids = torch.tensor(row.sequence_ids)[None]
        with torch.no_grad():
            all_values = model(ids, torch.ones_like(ids))[0].numpy()
        first = len(row.prompt.token_ids)
        # The state in which token t is chosen ends in token t - 1; the last token's never counts.
        np.testing.assert_allclose(values, all_values[first - 1 : -1], atol=1e-5)


def test_a_sequence_is_prompt_then_response() -> None:
    row = rollout(0, 2, 3)
    assert row.sequence_ids.tolist() == [*row.prompt.token_ids, *row.response_ids.tolist()]
