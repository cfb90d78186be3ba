"""The small models that the tests use have what their families are used for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import FAMILIES, Family, build
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_ray.config.model import LoraConfig, ModelConfig
from rlhf_ray.models import adapters, forward, loading
from rlhf_ray.models.merging import merge_adapter
from rlhf_ray.models.stop_conditions import stop_token_ids

MESSAGES = [{"role": "user", "content": "why does it leak?"}]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("families")
    return {family: build(family, folder / family) for family in FAMILIES}


def test_shapes_are_those_of_the_families(models: dict[str, str]) -> None:
    llama, qwen2, qwen3 = (AutoModelForCausalLM.from_pretrained(models[f]) for f in FAMILIES)
    assert llama.config.rope_parameters["rope_type"] == "llama3"
    assert llama.lm_head.weight is not llama.model.embed_tokens.weight
    for tied in (qwen2, qwen3):
        assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert qwen2.model.layers[0].self_attn.q_proj.bias.abs().min() > 0
    attention = qwen3.model.layers[0].self_attn
    assert attention.q_norm.weight.std() > 0
    assert attention.q_proj.weight.shape == (4 * 32, 96)
    assert llama.model.layers[0].self_attn.k_proj.weight.shape == (2 * 32, 128)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizers_chat_and_name_several_ends(models: dict[str, str], family: Family) -> None:
    tokenizer = loading.load_tokenizer(models[family])
    plain: Any = AutoTokenizer.from_pretrained(models[family])
    text = plain.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert "why does it leak?" in text
    assert len(stop_token_ids(models[family])) == (2 if family == "llama-3" else 1)
    assert tokenizer.pad_token_id not in stop_token_ids(models[family])
    starts_with_bos = tokenizer("leak")["input_ids"][0] == tokenizer.bos_token_id
    assert starts_with_bos == (family == "llama-3")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_adapted_merged_and_scored(
    models: dict[str, str], family: Family, tmp_path: Path
) -> None:
    base, settings = models[family], ModelConfig()
    ids_BS = torch.arange(10, 30).view(2, 10)
    lm = loading.load_causal_lm(base, settings)
    wrapped = adapters.attach(lm, LoraConfig(r=2), "CAUSAL_LM", seed=0, dropout=0.0).eval()
    assert len(adapters.peft_config(wrapped)["target_modules"]) == 7
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        expected = wrapped(ids_BS).logits
    loading.save_adapter(wrapped, loading.load_tokenizer(base), tmp_path / "adapter", base)
    merge_adapter(base, str(tmp_path / "adapter"), tmp_path / "merged", settings)
    with torch.no_grad():
        merged = loading.load_causal_lm(str(tmp_path / "merged"), settings)(ids_BS).logits
        plain = loading.load_causal_lm(base, settings)(ids_BS).logits
    torch.testing.assert_close(merged, expected, atol=1e-3, rtol=1e-4)
    assert (plain - expected).abs().max() > 0.1

    classifier = loading.load_sequence_classifier(base, settings)
    with torch.no_grad():
        scores_B = forward.sequence_scores(classifier, ids_BS, torch.ones_like(ids_BS))
    assert scores_B.isfinite().all()
    assert scores_B.std() > 0
