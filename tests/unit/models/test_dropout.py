from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf_ray.config.model import LoraConfig
from rlhf_ray.models.adapters import attach
from rlhf_ray.models.dropout import without_dropout


def models() -> list[Any]:
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


def test_a_model_in_training_mode_repeats_itself() -> None:
    ids = torch.arange(12)[None]
    for model in models():
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits), "it has no dropout"
        without_dropout(model)
        assert torch.equal(model(ids).logits, model(ids).logits)


def test_an_adapter_keeps_its_own() -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    model = attach(without_dropout(models()[1]), lora, "CAUSAL_LM", seed=0, dropout=0.5).train()
    kept = [m.p for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout)]
    assert kept == [0.5]
