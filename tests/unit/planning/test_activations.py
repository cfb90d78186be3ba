"""What passes take, against numbers worked out by hand and against what PyTorch keeps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_ray.config.model import LoraConfig, ModelConfig, ShapeConfig
from rlhf_ray.models import token_logprobs
from rlhf_ray.models.adapters import adapter_state, attach
from rlhf_ray.planning import activations
from rlhf_ray.planning.activations import Pass, adapter_pass_bytes, whole_pass_bytes
from rlhf_ray.planning.memory import deepspeed_parts
from rlhf_ray.planning.model_shape import described
from rlhf_ray.planning.model_sizes import num_trainable, shape_of, skeleton

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
    return activations.forward_bytes(shape, Pass(ROWS * LENGTH, LENGTH, 4))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_an_adapters_pass_keeps_what_is_foretold(targets: Any) -> None:
    lora = LoraConfig(r=4, target_modules=targets)
    base = LlamaForCausalLM(LLAMA)
    attach(base, lora, "CAUSAL_LM", seed=0, dropout=0.0).eval()
    what = Pass(ROWS * LENGTH, LENGTH, 4)
    shape = described(SMALL)
    foretold = adapter_pass_bytes(
        shape, lora, what, adapter_bytes=4, dropout=0.0, quantization="none"
    )
    assert foretold - temporaries(shape) == pytest.approx(kept(base.model, True), rel=0.05)


def test_a_whole_models_pass_keeps_what_is_foretold() -> None:
    base = LlamaForCausalLM(LLAMA)
    shape, what = described(SMALL), Pass(ROWS * LENGTH, LENGTH, 4)
    foretold = whole_pass_bytes(shape, what) - temporaries(shape)
    assert foretold == pytest.approx(kept(base.model, True), rel=0.05)


def test_recomputing_keeps_the_inputs_of_blocks_and_one_block() -> None:
    shape = described(SMALL)
    kept_all = whole_pass_bytes(shape, Pass(64, 32, 4)) - 2 * temporaries(shape) / 4
    recomputed = whole_pass_bytes(shape, Pass(64, 32, 4, recomputes=True))
    block = kept_all / 3
    assert recomputed == pytest.approx(3 * 64 * 64 * 4 + block + 2 * temporaries(shape) / 4)


def test_one_row_needs_no_mask() -> None:
    shape = described(SMALL)
    one, two = whole_pass_bytes(shape, Pass(64, 64, 4)), whole_pass_bytes(shape, Pass(64, 32, 4))
    assert two - one == 3 * 64 * 32 * 4


def test_chunks_of_logits_are_those_of_the_learners() -> None:
    assert activations.CHUNK_LOGITS == token_logprobs.CHUNK_LOGITS
    shape = described(SMALL)
    assert activations.chunked_logits_bytes(shape, 10) == 10 * 96 * 20
    assert activations.chunked_logits_bytes(shape, 10**9) == 2**24 * 20


def test_a_described_shape_is_that_of_a_folder(tmp_path: Path) -> None:
    LLAMA.save_pretrained(tmp_path)
    assert shape_of(skeleton(tmp_path, ModelConfig())) == described(SMALL)
    scalar = skeleton(tmp_path, ModelConfig(), "SEQ_CLS")
    assert shape_of(scalar).size == described(SMALL).with_scalar_head().size


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_an_adapter_has_the_parameters_that_peft_gives_it(tmp_path: Path, targets: Any) -> None:
    LLAMA.save_pretrained(tmp_path)
    lora = LoraConfig(r=8, target_modules=targets)
    model = skeleton(tmp_path, ModelConfig())
    assert described(SMALL).adapter_parameters(lora) == num_trainable(model, "CAUSAL_LM", lora)


def test_what_is_sent_is_the_adapters_tensors() -> None:
    lora = LoraConfig(r=8)
    state = adapter_state(attach(LlamaForCausalLM(LLAMA), lora, "CAUSAL_LM", seed=0, dropout=0.0))
    sent = sum(tensor.nbytes for tensor in state.values())
    assert sent == 4 * described(SMALL).adapter_parameters(lora)


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


def test_on_a_gpu_the_reduce_buffer_counts_whole() -> None:
    zero = {"reduce_bucket_size": 1000}
    assert deepspeed_parts(0, 100, "float32", 2, 1, {}, True)["reduce buffer"] == 4 * 5e8
    assert deepspeed_parts(0, 100, "float32", 2, 1, zero, True)["reduce buffer"] == 4000
