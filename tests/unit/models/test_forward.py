"""Padded micro-batches against a forward over each row alone, and scalar heads."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from rlhf_ray.algorithms.logprobs import SamplingRule
from rlhf_ray.config.model import LoraConfig, ModelConfig
from rlhf_ray.errors import DataError
from rlhf_ray.models import adapters
from rlhf_ray.models.forward import (
    Fp32Linear,
    ValueModel,
    backbone_and_head,
    initialise_head,
    response_logprobs,
    response_values,
    sequence_scores,
    token_values,
)
from rlhf_ray.models.loading import load_causal_lm, load_sequence_classifier, load_tokenizer
from rlhf_ray.models.token_logprobs import answer_with_logprobs, position_ids
from rlhf_ray.types import Prompt, Rollout

CPU = torch.device("cpu")
IDS_BS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]])
ATTENTION_BS = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


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


def test_position_ids_count_real_tokens() -> None:
    assert position_ids(torch.tensor([[1, 1, 0], [0, 1, 1]])).tolist() == [
        [0, 1, 1],
        [0, 0, 1],
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_are_head_times_hidden_in_fp32(base: Path, dtype: str) -> None:
    model = load_sequence_classifier(str(base), ModelConfig(dtype=dtype))  # type: ignore[arg-type]
    with torch.no_grad():
        values_BS = token_values(model, IDS_BS, ATTENTION_BS)
        hidden_BSD = model.model(
            IDS_BS,
            attention_mask=ATTENTION_BS,
            position_ids=position_ids(ATTENTION_BS),
        ).last_hidden_state
    assert values_BS.dtype == torch.float32
    expected_BS = hidden_BSD.float() @ model.score.weight[0]
    torch.testing.assert_close(values_BS, expected_BS)


def test_a_head_stays_in_fp32_when_its_model_is_cast_or_computes_in_autocast(base: Path) -> None:
    model = load_sequence_classifier(str(base), ModelConfig())
    wrapped = adapters.attach(model, LoraConfig(r=2), "SEQ_CLS", seed=0, dropout=0.0)
    weights = {name: p.clone() for name, p in wrapped.named_parameters() if "score" in name}
    for cast in (torch.nn.Module.half, torch.nn.Module.bfloat16):
        cast(wrapped)
        for name, weight in weights.items():
            assert torch.equal(wrapped.get_parameter(name), weight), name
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    with torch.no_grad():
        expected_BS = token_values(wrapped, IDS_BS, ATTENTION_BS)
        with torch.autocast("cpu", torch.bfloat16):
            computed_B = wrapped(IDS_BS, attention_mask=ATTENTION_BS).logits[:, 0]
    assert computed_B.dtype == torch.float32
    torch.testing.assert_close(computed_B[0], expected_BS[0, 4], rtol=0.02, atol=0.02)


def test_score_is_the_value_at_the_last_real_token(base: Path, settings: ModelConfig) -> None:
    model = load_sequence_classifier(str(base), settings)
    with torch.no_grad():
        values_BS = token_values(model, IDS_BS, ATTENTION_BS)
        scores_B = sequence_scores(model, IDS_BS, ATTENTION_BS)
        alone = sequence_scores(model, IDS_BS[1:, :3], ATTENTION_BS[1:, :3])
        transformers_own = model(IDS_BS, attention_mask=ATTENTION_BS).logits[:, 0]
    assert scores_B.tolist() == [values_BS[0, 4], values_BS[1, 2]]
    torch.testing.assert_close(alone, scores_B[1:])
    torch.testing.assert_close(transformers_own, scores_B)


def test_head_behind_peft_is_the_trained_copy(base: Path, settings: ModelConfig) -> None:
    model = load_sequence_classifier(str(base), settings)
    wrapped = adapters.attach(model, LoraConfig(r=2), "SEQ_CLS", seed=0, dropout=0.0)
    before_B = sequence_scores(wrapped, IDS_BS, ATTENTION_BS)
    _, head = backbone_and_head(wrapped)
    head.modules_to_save["default"].weight.data.mul_(2)  # type: ignore[union-attr,operator]
    after_B = sequence_scores(wrapped, IDS_BS, ATTENTION_BS)
    torch.testing.assert_close(after_B, 2 * before_B)


def test_new_head_has_the_papers_spread_and_zero_head_is_zero(base: Path) -> None:
    head = torch.nn.Linear(4096, 1, bias=False)
    model = torch.nn.Module()
    model.base_model_prefix, model.model, model.score = "model", torch.nn.Identity(), head  # type: ignore[assignment]
    initialise_head(model, seed=3)
    # 1 / sqrt(4097) = 0.015623; the deviation of 4096 draws is within 5% of it.
    assert head.weight.std().item() == pytest.approx(0.015623, rel=0.05)
    first = head.weight.detach().clone()
    initialise_head(model, seed=3)
    assert torch.equal(head.weight, first)
    initialise_head(model, seed=None)
    assert not head.weight.any()


def test_model_without_a_token_head_is_refused(base: Path, settings: ModelConfig) -> None:
    with pytest.raises(DataError, match="LlamaForCausalLM has no linear head"):
        backbone_and_head(load_causal_lm(str(base), settings))


def test_an_encoder_scores_but_is_no_critic(tmp_path: Path, base: Path) -> None:
    """An encoder's head stands on the first token, so the whole forward is the score."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    torch.manual_seed(0)
    encoder = BertForSequenceClassification(
        BertConfig(vocab_size=300, num_hidden_layers=1, num_labels=1, **size)
    ).eval()
    encoder.save_pretrained(tmp_path)
    load_tokenizer(str(base)).save_pretrained(tmp_path)
    model = load_sequence_classifier(str(tmp_path), ModelConfig(), require_head=True)
    with torch.no_grad():
        expected_B = [
            encoder(ids[None], attention_mask=mask[None]).logits.item()
            for ids, mask in zip(IDS_BS, ATTENTION_BS, strict=True)
        ]
        scores_B = sequence_scores(model, IDS_BS, ATTENTION_BS)
    torch.testing.assert_close(scores_B, torch.tensor(expected_B))
    half = load_sequence_classifier(str(tmp_path), ModelConfig(dtype="bfloat16"), require_head=True)
    assert isinstance(half.classifier, Fp32Linear)
    assert torch.equal(half.classifier.weight, encoder.classifier.weight)
    with torch.no_grad():
        halves_B = sequence_scores(half, IDS_BS, ATTENTION_BS)
    torch.testing.assert_close(halves_B, scores_B, rtol=0.02, atol=0.02)
    with pytest.raises(DataError, match="BertForSequenceClassification has no linear head `score`"):
        load_sequence_classifier(str(tmp_path), ModelConfig(), zero_head=True)


def test_an_encoder_without_a_trained_head_cannot_score(tmp_path: Path) -> None:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=300, num_hidden_layers=1, **size)).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="its files lack classifier"):
        load_sequence_classifier(str(tmp_path), ModelConfig(), require_head=True)
