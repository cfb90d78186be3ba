"""What is trained of a model, and how that is counted."""

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from rlhf_ray.config.model import LoraConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.models import adapters
from rlhf_ray.models.freezing import train_only
from rlhf_ray.models.parameters import (
    ParameterGroup,
    num_elements,
    parameter_groups,
    parameter_table,
)

SMALL = {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 50, "n_positions": 8}


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
        ("transformer.h.12", r"near are .*transformer\.h\.1"),
        ("transformer.ln_", r"near are .*transformer\.ln_f"),
        ("zzz", "they begin with lm_head or transformer"),
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
