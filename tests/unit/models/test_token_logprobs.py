"""Log-probs by chunks against those of the whole logits, with their gradients."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlhf_ray.algorithms.experience import response_logits
from rlhf_ray.algorithms.logprobs import SamplingRule, entropy, token_logprobs
from rlhf_ray.config.model import LoraConfig
from rlhf_ray.errors import DataError
from rlhf_ray.models import token_logprobs as module
from rlhf_ray.models.adapters import adapter_state, attach
from rlhf_ray.models.forward import causal_lm_logits
from rlhf_ray.models.token_logprobs import Entropy, answer_with_logprobs, chunked_logprobs
from rlhf_ray.models.trainable import recompute_activations

VOCABULARY = 50
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
SEQUENCES_BS = torch.randint(1, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
LENGTHS_B = torch.tensor([12, 9, 10])
ATTENTION_BS = (torch.arange(12) < LENGTHS_B[:, None]).long()
PROMPTS_B = torch.tensor([5, 2, 9])
MASK_BT = torch.arange(7) < (LENGTHS_B - PROMPTS_B)[:, None]
RESPONSES_BT = response_logits(SEQUENCES_BS[:, 1:], PROMPTS_B, 7)
BATCH = (SEQUENCES_BS, ATTENTION_BS, PROMPTS_B, RESPONSES_BT)
TEMPERATURE = 0.7

Make = Callable[[], Any]


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def qwen2_tied() -> Any:
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True))


def gemma2_capped() -> Any:
    shape = SHAPE | {"head_dim": 16}
    return Gemma2ForCausalLM(Gemma2Config(**shape, final_logit_softcapping=2.0))


def cohere_scaled() -> Any:
    return CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.25))


def granite_scaled() -> Any:
    return GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=4.0))


ARCHITECTURES = (llama, qwen2_tied, gemma2_capped, cohere_scaled, granite_scaled)


def wrapped(make: Make, targets: str | list[str] = "all-linear") -> Any:
    """The model with an adapter that is not zero, in evaluation mode."""
    torch.manual_seed(1)
    base = answer_with_logprobs(make())
    with torch.no_grad():
        base.get_output_embeddings().weight.normal_(std=0.2)  # logits that differ
    lora = LoraConfig(r=2, target_modules=targets)
    model = attach(base, lora, "CAUSAL_LM", seed=0, dropout=0.0).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    return model


def loss_of(logprobs_BT: Tensor, entropy_BT: Tensor) -> Tensor:
    """A mean that reads every real token with a weight of its own."""
    weights_BT = torch.linspace(0.05, 0.2, MASK_BT.numel()).view(MASK_BT.shape) * MASK_BT
    return (weights_BT * (logprobs_BT + 0.3 * entropy_BT)).sum() / MASK_BT.sum()


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def by_whole_logits(model: Any) -> tuple[Tensor, Tensor]:
    logits_BSV = causal_lm_logits(model)(SEQUENCES_BS, ATTENTION_BS)
    logits_BTV = response_logits(logits_BSV, PROMPTS_B, RESPONSES_BT.shape[1])
    return token_logprobs(logits_BTV, RESPONSES_BT, TEMPERATURE), entropy(logits_BTV, TEMPERATURE)


def by_chunks(model: Any, entropy: Entropy = "gradient") -> tuple[Tensor, ...]:
    return chunked_logprobs(model, *BATCH, rule=SamplingRule(TEMPERATURE), entropy=entropy)


@pytest.fixture(params=[1, 2, 5, 1000], ids="{} tokens a chunk".format)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens of a chunk: the batch has 21."""
    monkeypatch.setattr(module, "CHUNK_LOGITS", request.param * VOCABULARY)
    return request.param


@pytest.mark.parametrize("make", ARCHITECTURES)
def test_values_and_gradients_are_those_of_the_whole_logits(make: Make, chunk: int) -> None:
    model = wrapped(make)
    expected, found = by_whole_logits(model), by_chunks(model)
    for theirs, ours in zip(expected, found, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours[MASK_BT], theirs[MASK_BT], rtol=1e-6, atol=1e-6)
    theirs, ours = (gradients(model, loss_of(*parts)) for parts in (expected, found))
    assert ours.keys() == theirs.keys()
    assert all(gradient.abs().max() > 0 for gradient in theirs.values())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=2e-6, msg=name)


def test_an_adapted_output_layer_gets_its_gradients(chunk: int) -> None:
    """The output layer alone is adapted: the hidden states themselves need no gradient."""
    model = wrapped(llama, ["lm_head"])
    theirs = gradients(model, loss_of(*by_whole_logits(model)))
    ours = gradients(model, loss_of(*by_chunks(model)))
    assert len(theirs) == 2
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=2e-6)


def test_half_precision_and_recomputed_blocks(chunk: int) -> None:
    model = recompute_activations(wrapped(lambda: llama().bfloat16()))
    assert model.lm_head.weight.dtype == torch.bfloat16
    theirs = gradients(model, loss_of(*by_whole_logits(model)))
    logprobs_BT, entropy_BT = by_chunks(model)
    torch.testing.assert_close(logprobs_BT[MASK_BT], by_whole_logits(model)[0][MASK_BT])
    ours = gradients(model, loss_of(logprobs_BT, entropy_BT))
    blocks = [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]
    assert all(block.training for block in blocks)  # the comparison gave modes back
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0.02, atol=0.02, msg=name)


def test_the_base_answers_with_the_adapter_off(chunk: int) -> None:
    model = wrapped(llama)
    with torch.no_grad(), model.disable_adapter():
        (ours,), theirs = by_chunks(model, "none"), by_whole_logits(model)[0]
    torch.testing.assert_close(ours[MASK_BT], theirs[MASK_BT], rtol=1e-6, atol=1e-6)
    assert (ours - by_chunks(model, "none")[0]).abs().max() > 0.01


def test_entropy_costs_a_gradient_only_where_it_is_asked_for(chunk: int) -> None:
    model = wrapped(llama)
    logprobs_BT, entropy_BT = by_chunks(model, "value")
    assert logprobs_BT.requires_grad
    assert not entropy_BT.requires_grad
    torch.testing.assert_close(entropy_BT, by_chunks(model, "gradient")[1])
    assert len(by_chunks(model, "none")) == 1


def test_the_head_is_called_once_and_sees_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", 5 * VOCABULARY)
    model = wrapped(llama)
    by_chunks(model)  # the first one compares with the model's own logits
    sizes: list[int] = []
    product = torch.nn.functional.linear

    def spy(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight is model.lm_head.weight:
            sizes.append(hidden.shape[0])
        return product(hidden, weight, bias)

    calls: list[Any] = []
    model.lm_head.register_forward_hook(lambda *call: calls.append(call))
    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    loss = loss_of(*by_chunks(model))
    assert sizes == [5, 5, 5, 5, 1]
    loss.backward()
    assert sorted(sizes) == sorted([5, 5, 5, 5, 1] * 2)  # made again, not kept
    assert len(calls) == 1
    assert "forward" not in vars(model.lm_head)


def test_other_forward_passes_and_names_stay_as_they_are() -> None:
    plain, taught = wrapped(llama), wrapped(llama)
    by_chunks(taught)
    assert list(adapter_state(plain)) == list(adapter_state(taught))
    assert "input_ids" in inspect.signature(taught.get_base_model().forward).parameters
    generated = taught.generate(input_ids=SEQUENCES_BS[:1], max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 15)


def test_logits_that_are_changed_in_an_unknown_way_are_refused() -> None:
    class Sharper(LlamaForCausalLM):
        def forward(self, *args: Any, **inputs: Any) -> Any:
            output = super().forward(*args, **inputs)
            output.logits = 3 * output.logits
            return output

    model = wrapped(lambda: Sharper(LlamaConfig(**SHAPE)))
    with pytest.raises(DataError, match=r"Sharper transforms its logits after the output layer"):
        by_chunks(model)


def test_a_model_without_an_output_layer_is_refused() -> None:
    with pytest.raises(DataError, match=r"LlamaModel is not a transformer with an output layer"):
        answer_with_logprobs(llama().model)
