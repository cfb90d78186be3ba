"""Shapes read from config.json alone, by a client, are those of the models themselves."""

import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from rlhf_ray.config.model import ModelConfig
from rlhf_ray.errors import DataError
from rlhf_ray.planning import model_sizes, shapes

SIZES = {
    "num_hidden_layers": 3,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 1376,
    "vocab_size": 4000,
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "mistral", "olmo2", "qwen2", "qwen3"])
def test_a_client_reads_the_shape_that_the_model_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, tied: bool
) -> None:
    AutoConfig.for_model(kind, **SIZES, tie_word_embeddings=tied).save_pretrained(tmp_path)
    whole = model_sizes.shape_of(model_sizes.skeleton(tmp_path, ModelConfig()))
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = shapes._model("model.path", str(tmp_path), None, remote=False)
    assert found is not None
    shape = found.shape
    assert set(shape.linears) == set(whole.linears)
    assert (shape.head_dim, shape.num_kv_heads) == (whole.head_dim, whole.num_kv_heads)
    assert shape.output_parameters == whole.output_parameters
    assert shape.size.parameters == pytest.approx(whole.size.parameters, rel=1e-3)


def test_a_client_says_what_a_broken_config_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 512}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DataError, match="num_hidden_layers"):
        shapes._model("model.path", str(tmp_path), None, remote=False)
