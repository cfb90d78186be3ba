from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, BertConfig

from rlhf_ray.config.model import ModelConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.models import loading
from rlhf_ray.models.rope import rope_parameters

IDS_BS = torch.arange(3, 23)[None]
LINEAR = ModelConfig(rope_scaling={"rope_type": "linear", "factor": 2.0})


def test_scaling_lies_over_the_bases_own(base: Path) -> None:
    assert rope_parameters(str(base), ModelConfig()) is None
    expected = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}
    assert rope_parameters(str(base), LINEAR) == expected


def test_linear_scaling_is_half_the_position(base: Path, settings: ModelConfig) -> None:
    """At factor 2, token s stands where token s / 2 stood."""
    plain = loading.load_causal_lm(str(base), settings)
    scaled = loading.load_causal_lm(str(base), LINEAR)
    positions_BS = torch.arange(IDS_BS.shape[1])[None]
    attention_BS = torch.ones_like(IDS_BS)  # without it, gaps in the positions part documents

    def logits(model: Any, positions_BS: torch.Tensor) -> torch.Tensor:
        return model(IDS_BS, attention_mask=attention_BS, position_ids=positions_BS).logits

    with torch.no_grad():
        expected = logits(plain, positions_BS / 2)
        found = logits(scaled, positions_BS)
        unscaled = logits(plain, positions_BS)
    torch.testing.assert_close(found, expected)
    assert (found - unscaled).abs().max() > 1e-5


def test_a_saved_model_keeps_it_and_a_classifier_of_it_too(base: Path, tmp_path: Path) -> None:
    classifier = loading.load_sequence_classifier(str(base), LINEAR)
    loading.save_model(classifier, loading.load_tokenizer(str(base)), tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_type"] == "linear"
    other = ModelConfig(rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert rope_parameters(str(tmp_path), other) is None  # finished: not the base's business
    loaded = loading.load_sequence_classifier(str(tmp_path), other)
    assert loaded.config.rope_parameters["factor"] == 2.0


def test_an_architecture_without_rotary_embedding_is_refused(tmp_path: Path) -> None:
    BertConfig(architectures=["BertLMHeadModel"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.rope_scaling: .* \(bert\) has no rotary"):
        rope_parameters(str(tmp_path), LINEAR)
