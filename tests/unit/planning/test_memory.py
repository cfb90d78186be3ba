"""Predicted memory against published numbers, numbers worked by hand, and what PyTorch keeps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
)

from rlhf_ray.config.model import LoraConfig, ModelConfig, ShapeConfig
from rlhf_ray.errors import DataError
from rlhf_ray.models import token_logprobs
from rlhf_ray.models.adapters import adapter_state, attach
from rlhf_ray.planning import memory
from rlhf_ray.planning.memory import (
    GB,
    ModelSize,
    Pass,
    adapter_pass_bytes,
    deepspeed_parts,
    whole_pass_bytes,
)
from rlhf_ray.planning.model_sizes import num_trainable, shape_of, skeleton
from rlhf_ray.planning.shapes import described_shape

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
    with pytest.raises(DataError, match=r"has no config\.json of a known architecture"):
        skeleton(tmp_path, ModelConfig())


SMALL = ShapeConfig(
    num_layers=3, hidden_size=64, num_heads=4, num_kv_heads=2, intermediate_size=160, vocab_size=96
)
LLAMA = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
ROWS, LENGTH = 4, 32


def kept(model: Any, with_padding: bool) -> int:
    """Bytes of the distinct tensors, parameters aside, that a forward pass keeps."""
    ours = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            found[storage.data_ptr()] = storage
        return tensor

    ids_BS = torch.randint(0, 96, (ROWS, LENGTH))
    attention_BS = torch.ones_like(ids_BS)
    attention_BS[0, LENGTH // 2 :] = 1 - int(with_padding)
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        output = model(input_ids=ids_BS, attention_mask=attention_BS, use_cache=False)
    assert output.last_hidden_state.requires_grad
    return sum(storage.nbytes() for storage in found.values())


def temporaries(shape: Any) -> float:
    return memory.forward_bytes(shape, Pass(ROWS * LENGTH, LENGTH, 4))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_an_adapters_pass_keeps_what_is_foretold(targets: Any) -> None:
    lora = LoraConfig(r=4, target_modules=targets)
    base = LlamaForCausalLM(LLAMA)
    attach(base, lora, "CAUSAL_LM", seed=0, dropout=0.0).eval()
    what = Pass(ROWS * LENGTH, LENGTH, 4)
    shape = described_shape(SMALL)
    foretold = adapter_pass_bytes(
        shape, lora, what, adapter_bytes=4, dropout=0.0, quantization="none"
    )
    assert foretold - temporaries(shape) == pytest.approx(kept(base.model, True), rel=0.05)


def test_a_whole_models_pass_keeps_what_is_foretold() -> None:
    base = LlamaForCausalLM(LLAMA)
    shape, what = described_shape(SMALL), Pass(ROWS * LENGTH, LENGTH, 4)
    foretold = whole_pass_bytes(shape, what) - temporaries(shape)
    assert foretold == pytest.approx(kept(base.model, True), rel=0.05)


def test_recomputing_keeps_the_inputs_of_blocks_and_one_block() -> None:
    shape = described_shape(SMALL)
    kept_all = whole_pass_bytes(shape, Pass(64, 32, 4)) - 2 * temporaries(shape) / 4
    recomputed = whole_pass_bytes(shape, Pass(64, 32, 4, recomputes=True))
    block = kept_all / 3
    assert recomputed == pytest.approx(3 * 64 * 64 * 4 + block + 2 * temporaries(shape) / 4)


def test_one_row_needs_no_mask() -> None:
    shape = described_shape(SMALL)
    one, two = whole_pass_bytes(shape, Pass(64, 64, 4)), whole_pass_bytes(shape, Pass(64, 32, 4))
    assert two - one == 3 * 64 * 32 * 4


def test_chunks_of_logits_are_those_of_the_learners() -> None:
    assert memory.CHUNK_LOGITS == token_logprobs.CHUNK_LOGITS
    shape = described_shape(SMALL)
    assert memory.chunked_logits_bytes(shape, 10) == 10 * 96 * 20
    assert memory.chunked_logits_bytes(shape, 10**9) == 2**24 * 20


def test_a_described_shape_is_that_of_a_folder(tmp_path: Path) -> None:
    LLAMA.save_pretrained(tmp_path)
    assert shape_of(skeleton(tmp_path, ModelConfig())) == described_shape(SMALL)
    scalar = skeleton(tmp_path, ModelConfig(), "SEQ_CLS")
    assert shape_of(scalar).size == described_shape(SMALL).with_scalar_head().size


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_an_adapter_has_the_parameters_that_peft_gives_it(tmp_path: Path, targets: Any) -> None:
    LLAMA.save_pretrained(tmp_path)
    lora = LoraConfig(r=8, target_modules=targets)
    model = skeleton(tmp_path, ModelConfig())
    assert described_shape(SMALL).adapter_parameters(lora) == num_trainable(
        model, "CAUSAL_LM", lora
    )


def test_what_is_sent_is_the_adapters_tensors() -> None:
    lora = LoraConfig(r=8)
    state = adapter_state(attach(LlamaForCausalLM(LLAMA), lora, "CAUSAL_LM", seed=0, dropout=0.0))
    sent = sum(tensor.nbytes for tensor in state.values())
    assert sent == 4 * described_shape(SMALL).adapter_parameters(lora)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(0, 1000, 600, 1200), (1, 1000, 300, 300), (2, 1000, 150, 300), (3, 250, 150, 300)],
)
def test_zero_shards_optimizer_then_gradients_then_weights(
    stage: int, weights: float, gradients: float, optimizer: float
) -> None:
    parts = deepspeed_parts(1000, 100, "bfloat16", stage, 4, {}, on_gpu=False)
    assert parts["weights"] == weights
    assert parts["gradients"] == gradients  # 2 bytes as they come, 4 at the step
    assert parts["optimizer"] == optimizer  # 4 of the master copy, 8 of Adam's moments
    assert parts["adapter"] == (50 if stage == 3 else 200)
    assert parts["reduce buffer"] == 200


def test_what_is_offloaded_is_not_on_the_device() -> None:
    to_cpu = {"device": "cpu"}
    zero = {"offload_optimizer": to_cpu, "offload_param": to_cpu}
    parts = deepspeed_parts(1000, 100, "float32", 3, 4, zero, False, "bfloat16")
    assert parts["weights"] == parts["adapter"] == parts["optimizer"] == 0
    assert parts["gathered"] == 700  # what a pass gathers, here all, in half precision
    assert parts["gradients"] == 100
    parts = deepspeed_parts(1000, 100, "float32", 2, 4, {"offload_optimizer": to_cpu}, False)
    assert parts["gradients"] == parts["optimizer"] == 0
    assert parts["weights"] == 1000


def test_on_a_gpu_the_reduce_buffer_counts_whole() -> None:
    zero = {"reduce_bucket_size": 1000}
    assert deepspeed_parts(0, 100, "float32", 2, 1, {}, True)["reduce buffer"] == 4 * 5e8
    assert deepspeed_parts(0, 100, "float32", 2, 1, zero, True)["reduce buffer"] == 4000
