"""Adapters on parts of a model: what is trained is loaded again and merged, or refused at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build_random, random_model

from rlhf_ray.config.model import LoraConfig, ModelConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.models import loading
from rlhf_ray.models.adapters import attach, peft_config, unwrapped
from rlhf_ray.models.merging import merge_adapter, verify_saved
from rlhf_ray.models.probes import probe_logits
from rlhf_ray.models.targets import adapted_modules

TEXTS = ["why does it leak?"]
IN_LAYER_1 = {f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj")}


def changed(model: Any, lora: LoraConfig, task: Any = "CAUSAL_LM") -> Any:
    """The model with an adapter, none of whose weights is zero."""
    wrapped = attach(model, lora, task, seed=0, dropout=0.0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in (weight for weight in wrapped.parameters() if weight.requires_grad):
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return wrapped


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return build_random("llama", tmp_path / "llama", TEXTS)


CASES: list[tuple[dict[str, Any], set[str]]] = [
    ({"target_modules": ["layers.1.self_attn.q_proj"]}, {"model.layers.1.self_attn.q_proj"}),
    ({"target_modules": ["layers.1.self_attn.q_proj", "v_proj"]}, set()),
    (
        {"target_modules": ["q_proj", "v_proj"], "peft": {"layers_to_transform": [1]}},
        IN_LAYER_1,
    ),
    ({"peft": {"layers_to_transform": 1, "exclude_modules": ["q_proj"]}}, set()),
    ({"peft": {"layers_to_transform": [1]}}, set()),
    ({"peft": {"layers_to_transform": [0, 1], "layers_pattern": "layers"}}, set()),
    ({"peft": {"exclude_modules": ["model.layers.0.mlp.up_proj"]}}, set()),
    ({"peft": {"exclude_modules": ["up_proj"]}}, set()),
    ({"target_modules": ["lm_head"]}, {"lm_head"}),
    ({}, set()),
]


@pytest.mark.parametrize(("lora", "modules"), CASES)
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_an_adapter_on_part_of_a_model_is_saved_loaded_and_merged(
    llama: str, tmp_path: Path, lora: dict[str, Any], modules: set[str], task: str
) -> None:
    settings = ModelConfig()
    is_lm = task == "CAUSAL_LM"
    if lora.get("target_modules") == ["lm_head"] and not is_lm:
        pytest.skip("a classifier has no lm_head")
    load: Callable[..., Any] = loading.load_causal_lm if is_lm else loading.load_sequence_classifier
    model = changed(load(llama, settings), LoraConfig(r=2, **lora), task)
    if modules:
        assert set(adapted_modules(model)) == modules
    if lora.get("peft", {}).get("layers_to_transform") in (1, [1]):
        assert all(".1." in name for name in adapted_modules(model))
    logits = probe_logits(model)
    folder = str(tmp_path / "adapter")
    loading.save_adapter(model, loading.load_tokenizer(llama), folder, llama)
    verify_saved(model, logits, folder, settings)
    again = attach_like(load(llama, settings), peft_config(model))
    assert adapted_modules(again) == adapted_modules(model)
    merge_adapter(llama, folder, tmp_path / "merged", settings)
    merged = load(str(tmp_path / "merged"), settings)
    torch.testing.assert_close(probe_logits(merged), logits, atol=1e-3, rtol=1e-3)
    assert (probe_logits(load(llama, settings)) - logits).abs().max() > 0.1


def attach_like(base: Any, settings: dict[str, Any]) -> Any:
    """Wrap a base by the config that generators get."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    return get_peft_model(base, PeftLoraConfig(**settings))


def test_names_are_short_where_short_names_suffice() -> None:
    model = changed(random_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    assert peft_config(model)["target_modules"] == ["q_proj"]
    lora = LoraConfig(r=2, target_modules=["layers.1.self_attn.q_proj"])
    one = changed(random_model("llama"), lora)
    assert peft_config(one)["target_modules"] == ["model.layers.1.self_attn.q_proj"]


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("llama", {}, {"target_modules": ["embed_tokens"]}, "embed_tokens is no linear layer"),
    ("llama", {}, {"target_modules": ["self_attn"]}, "self_attn is no linear layer"),
    ("llama", {}, {"target_modules": ["layers.7.self_attn.q_proj"]}, "has no layers.7.self_attn"),
    ("llama", {}, {"target_modules": ["q_proj", "layers.9.mlp.up_proj"]}, "no layers.9.mlp.up"),
    ("llama", {}, {"peft": {"layers_to_transform": [1, 9]}}, "the model has no layer 9"),
    ("llama", {}, {"peft": {"layers_to_transform": [9]}}, "peft cannot put this adapter"),
    (
        "llama",
        {},
        {"target_modules": ["q_proj"], "peft": {"exclude_modules": ["q_proj"]}},
        "peft cannot put this adapter",
    ),
    (
        "llama",
        {"tie_word_embeddings": True},
        {"target_modules": ["lm_head"]},
        "weight of lm_head is that of the input embedding too",
    ),
    ("gpt2", {}, {"target_modules": ["lm_head", "c_attn"]}, "weight of lm_head is that"),
    ("opt", {}, {"target_modules": ["lm_head"]}, "weight of lm_head is that"),
    ("mixtral", {}, {}, r"experts, gate of this mixture.*=\[k_proj,o_proj,q_proj,v_proj\]"),
    ("mamba", {}, {}, "peft cannot put this adapter on MambaForCausalLM .*linear layers: "),
]


@pytest.mark.parametrize(("kind", "shape", "lora", "says"), REFUSED)
def test_an_adapter_that_could_not_be_used_is_refused_before_it_is_trained(
    kind: str, shape: dict[str, Any], lora: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        attach(
            random_model(kind, **shape), LoraConfig(r=2, **lora), "CAUSAL_LM", seed=0, dropout=0.0
        )


def test_all_linear_on_experts_with_dropout_names_the_layers_to_list() -> None:
    lora = LoraConfig(r=2, dropout=0.05)
    with pytest.raises(ConfigError, match=r"all-linear: .*k_proj, .*q_proj"):
        attach(random_model("mixtral"), lora, "CAUSAL_LM", seed=0, dropout=0.05)
    listed = LoraConfig(r=2, target_modules=["q_proj", "k_proj"])
    model = attach(random_model("mixtral"), listed, "CAUSAL_LM", seed=0, dropout=0.05)
    assert len(adapted_modules(model)) == 4
    assert type(unwrapped(model)).__name__ == "MixtralForCausalLM"
