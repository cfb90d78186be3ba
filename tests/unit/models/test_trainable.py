"""The trained part of a model, its count, and training with dropout off."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_ray.config.model import LoraConfig, ModelConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.models import adapters, loading
from rlhf_ray.models.trainable import (
    ParameterGroup,
    num_elements,
    parameter_groups,
    parameter_table,
    recompute_activations,
    train_only,
    without_dropout,
)

SMALL = {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 50, "n_positions": 8}
IDS_BS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


@pytest.fixture
def on_meta() -> Iterator[None]:
    """Models of any size are built in no memory."""
    with torch.device("meta"):
        yield


@pytest.fixture
def gpt2(on_meta: None) -> torch.nn.Module:
    """GPT-2 in its published shape."""
    return AutoModelForCausalLM.from_config(GPT2Config())


def test_the_last_block_and_norm_of_gpt2_are_seven_of_124_million(gpt2: torch.nn.Module) -> None:
    train_only(gpt2, ["transformer.h.11", "transformer.ln_f"], "sft.unfreeze")
    groups = parameter_groups(gpt2)
    block = 7_087_872
    assert groups == [
        ParameterGroup("transformer.wte", 50_257 * 768, 0),
        ParameterGroup("transformer.wpe", 1024 * 768, 0),
        ParameterGroup("transformer.h.0-10", 11 * block, 0),
        ParameterGroup("transformer.h.11", block, block),
        ParameterGroup("transformer.ln_f", 1536, 1536),
    ]
    assert sum(group.trainable for group in groups) == 7_089_408
    assert sum(group.parameters for group in groups) == 124_439_808
    last = parameter_table(groups).splitlines()[-1]
    assert last.split() == ["all", "124,439,808", "7,089,408", "5.70%"]


def test_a_prefix_names_whole_modules(gpt2: torch.nn.Module) -> None:
    train_only(gpt2, ["transformer.h.1"], "sft.unfreeze")
    trained = [group.name for group in parameter_groups(gpt2) if group.trainable]
    assert trained == ["transformer.h.1"]  # neither 10 nor 11


def test_shared_weights_are_trained_under_either_name(gpt2: torch.nn.Module) -> None:
    train_only(gpt2, ["lm_head"], "sft.unfreeze")
    trained = [group for group in parameter_groups(gpt2) if group.trainable]
    assert trained == [ParameterGroup("transformer.wte", 50_257 * 768, 50_257 * 768)]


@pytest.mark.parametrize(
    ("prefix", "hint"),
    [
        ("transformer.h.12", r"did you mean .*transformer\.h\.1"),
        ("transformer.ln_", r"did you mean .*transformer\.ln_f"),
        ("zzz", "names begin with lm_head or transformer"),
    ],
)
def test_a_prefix_that_no_module_has_is_refused(
    gpt2: torch.nn.Module, prefix: str, hint: str
) -> None:
    with pytest.raises(ConfigError, match=rf"sft\.unfreeze: .*{prefix!r}; {hint}"):
        train_only(gpt2, ["transformer.ln_f", prefix], "sft.unfreeze")


def test_frozen_tensors_do_not_move_in_a_step() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(**SMALL))
    train_only(model, ["transformer.h.2", "transformer.ln_f"], "sft.unfreeze")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    ids = torch.tensor([[1, 2, 3, 4]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trained = ("transformer.h.2.", "transformer.ln_f.")
    assert moved == {name for name in before if name.startswith(trained)}


def test_an_adapter_of_rank_4_adds_12288_to_each_attention_of_gpt2(
    gpt2: torch.nn.Module,
) -> None:
    lora = LoraConfig(r=4, target_modules=["c_attn"])  # 768 x 2304: 768 * 4 + 4 * 2304
    groups = parameter_groups(adapters.attach(gpt2, lora, "CAUSAL_LM", seed=0, dropout=0.0))
    blocks = next(group for group in groups if group.name == "transformer.h.0-11")
    assert blocks.trainable == 12 * 12_288
    assert blocks.parameters == 12 * (7_087_872 + 12_288)


def test_stackllamas_adapter_of_a_llama_of_7b(on_meta: None) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(), dtype=torch.bfloat16)
    lora = LoraConfig(r=16, target_modules=["q_proj", "v_proj"])
    groups = parameter_groups(adapters.attach(model, lora, "CAUSAL_LM", seed=0, dropout=0.0))
    assert sum(group.trainable for group in groups) == 8_388_608


def test_four_bits_count_as_what_they_stand_for() -> None:
    packed = torch.nn.Parameter(torch.zeros(32, dtype=torch.uint8), requires_grad=False)
    assert num_elements(packed) == 32
    packed.quant_state = type("State", (), {"shape": torch.Size([8, 8])})()  # type: ignore[attr-defined]
    assert num_elements(packed) == 64


def wrapped(base: Path) -> torch.nn.Module:
    model = loading.load_causal_lm(str(base), ModelConfig())
    return adapters.attach(model, LoraConfig(r=2), "CAUSAL_LM", seed=0, dropout=0.5).eval()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model(IDS_BS, labels=IDS_BS).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_activations_are_computed_twice_and_gradients_are_the_same(base: Path) -> None:
    plain = gradients(wrapped(base))
    model = recompute_activations(wrapped(base))
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for block in blocks:
        block.self_attn.q_proj.register_forward_hook(count)
    found = gradients(model)
    assert len(blocks) == 2
    assert calls == 4  # forward, and again in the backward pass
    assert found.keys() == plain.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain[name])


def test_dropout_stays_off_with_checkpointing(base: Path) -> None:
    model = recompute_activations(wrapped(base))
    assert not any(m.training for m in model.modules() if isinstance(m, torch.nn.Dropout))
    assert torch.equal(model(IDS_BS).logits, model(IDS_BS).logits)


def test_blocks_with_dropout_of_their_own_are_refused(base: Path) -> None:
    model = wrapped(base)
    next(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)).dropout = 0.1
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM cannot recompute activations"):
        recompute_activations(model)


def models() -> list[PreTrainedModel]:
    torch.manual_seed(0)
    gpt2 = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    llama = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        attention_dropout=0.5,
    )
    return [GPT2LMHeadModel(gpt2), LlamaForCausalLM(llama)]


def test_without_dropout_training_mode_is_deterministic() -> None:
    ids = torch.arange(12)[None]
    for model in models():
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits), "it has no dropout"
        without_dropout(model)
        assert torch.equal(model(ids).logits, model(ids).logits)


def test_an_adapter_keeps_its_own_dropout() -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    model = adapters.attach(
        without_dropout(models()[1]), lora, "CAUSAL_LM", seed=0, dropout=0.5
    ).train()
    kept = [m.p for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout)]
    assert kept == [0.5]
