from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_ray.config.model import LoraConfig, ModelConfig
from rlhf_ray.engines.served_adapters import (
    digest,
    refuse_unservable,
    tensors_from_bytes,
    tensors_to_bytes,
)
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models import adapters, loading


def attached(base: Path, **lora: object) -> object:
    model = loading.load_causal_lm(str(base), ModelConfig())
    return adapters.attach(model, LoraConfig(r=2, **lora), "CAUSAL_LM", seed=0, dropout=0.0)  # type: ignore[arg-type]


def test_all_linear_is_every_linear_layer_but_the_output(base: Path) -> None:
    model = attached(base)
    assert adapters.peft_config(model)["target_modules"] == [  # type: ignore[arg-type]
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
    # Per layer r * (in + out): four of 32 x 32, three of 32 x 64; two layers.
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)  # type: ignore[attr-defined]
    assert trainable == 2 * (4 * 2 * (32 + 32) + 3 * 2 * (32 + 64))


def test_state_and_digest_round_trip(base: Path) -> None:
    first, second = attached(base), attached(base)
    with torch.no_grad():
        for weight in first.parameters():  # type: ignore[attr-defined]
            weight.add_(0.1 * weight.requires_grad)
    state = adapters.adapter_state(first)  # type: ignore[arg-type]
    assert digest(adapters.adapter_state(second)) != digest(state)  # type: ignore[arg-type]
    sent = tensors_from_bytes(tensors_to_bytes(state))
    adapters.load_adapter_state(second, sent)  # type: ignore[arg-type]
    assert digest(adapters.adapter_state(second)) == digest(state)  # type: ignore[arg-type]


def test_adapter_of_another_shape_is_refused(base: Path) -> None:
    narrow = attached(base, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="does not fit the model: 24 names differ"):
        adapters.load_adapter_state(narrow, adapters.adapter_state(attached(base)))  # type: ignore[arg-type]


def test_unknown_target_names_what_there_is(base: Path) -> None:
    with pytest.raises(ConfigError, match="the model has no qkv; it has down_proj, gate_proj"):
        attached(base, target_modules=["qkv"])


def test_targets_that_an_engine_cannot_serve_are_named() -> None:
    servable = ["v_proj", "q_proj", "gate"]
    refuse_unservable(["q_proj", "v_proj"], servable)
    message = r"cannot serve an adapter on experts, o_proj .* it can on gate, q_proj, v_proj\. Set"
    with pytest.raises(ConfigError, match=message):
        refuse_unservable(["q_proj", "o_proj", "experts"], servable)


def test_an_adapter_that_its_base_takes_in_part_is_refused(base: Path, tmp_path: Path) -> None:
    """The adapter of a deeper model: peft loads what it finds a place for and says nothing."""
    tokenizer = loading.load_tokenizer(str(base))
    loading.save_adapter(attached(base), tokenizer, tmp_path, str(base))  # type: ignore[arg-type]
    config = LlamaConfig.from_pretrained(base, num_hidden_layers=1)
    shallow = LlamaForCausalLM(config)
    with pytest.raises(
        DataError, match=r"14 of its weights do not match those .*layers\.1\..*lora_A"
    ):
        loading.with_adapter(shallow, str(tmp_path))
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(DataError, match="cannot be loaded"):
        loading.with_adapter(shallow, str(tmp_path))
