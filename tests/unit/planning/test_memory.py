"""What models take: against the numbers of the reports that they come from."""

from pathlib import Path

import pytest
from transformers import GPT2Config, LlamaConfig, OPTConfig, PretrainedConfig, Qwen2Config

from rlhf_ray.config.model import LoraConfig, ModelConfig
from rlhf_ray.errors import DataError
from rlhf_ray.planning import memory
from rlhf_ray.planning.memory import GB, ModelSize
from rlhf_ray.planning.model_sizes import num_trainable, shape_of, skeleton

BILLION = 10**9
OPT_6_7B = OPTConfig(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    ffn_dim=16384,
    word_embed_proj_dim=4096,
    vocab_size=50272,
)
QWEN25_0_5B = Qwen2Config(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


def written(config: PretrainedConfig, folder: Path) -> Path:
    config.save_pretrained(folder)
    return folder


def test_quantised_weights_take_a_byte_or_half_and_the_rest_stays() -> None:
    size = ModelSize(parameters=7 * BILLION, quantizable=7 * BILLION)
    assert memory.weights_bytes(size, "bfloat16", "int8") == 7 * GB
    assert memory.weights_bytes(size, "bfloat16", "nf4") == pytest.approx(3.61 * GB, rel=1e-3)
    mixed = ModelSize(parameters=1000, quantizable=600)
    assert memory.weights_bytes(mixed, "bfloat16", "int8") == 600 + 400 * 2
    assert memory.weights_bytes(mixed, "float32") == 4000


@pytest.mark.parametrize(
    ("config", "parameters", "quantizable"),
    [
        (LlamaConfig(), 6_738_415_616, 32 * (4 * 4096**2 + 3 * 4096 * 11008)),
        (OPT_6_7B, 6_658_473_984, 32 * (4 * 4096**2 + 2 * 4096 * 16384)),
        (GPT2Config(), 124_439_808, 12 * (3 * 768**2 + 768**2 + 8 * 768**2)),
        (QWEN25_0_5B, 494_032_768, 24 * (2 * 896**2 + 2 * 896 * 128 + 3 * 896 * 4864)),
    ],
    ids=["llama", "opt", "gpt2", "qwen2"],
)
def test_parameters_are_counted_from_the_config_alone(
    tmp_path: Path, config: PretrainedConfig, parameters: int, quantizable: int
) -> None:
    size = shape_of(skeleton(written(config, tmp_path), ModelConfig())).size
    assert size == ModelSize(parameters, quantizable)


def test_opt_6_7b_takes_13_gb_in_half_precision(tmp_path: Path) -> None:
    size = shape_of(skeleton(written(OPT_6_7B, tmp_path), ModelConfig())).size
    assert round(memory.weights_bytes(size, "float16") / GB) == 13


def test_what_stages_train_of_a_llama_of_7b(tmp_path: Path) -> None:
    folder, settings = written(LlamaConfig(), tmp_path), ModelConfig()
    lora = LoraConfig(r=16, target_modules=["q_proj", "v_proj"])
    assert num_trainable(skeleton(folder, settings), "CAUSAL_LM", lora) == 8_388_608
    scorer = skeleton(folder, settings, "SEQ_CLS")
    assert num_trainable(scorer, "SEQ_CLS", lora) == 8_388_608 + 4096
    whole = skeleton(folder, settings)
    assert num_trainable(whole, "CAUSAL_LM", None) == 6_738_415_616
    assert num_trainable(whole, "CAUSAL_LM", None, ["lm_head"]) == 32000 * 4096


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no config\.json of a known model"):
        skeleton(tmp_path, ModelConfig())
