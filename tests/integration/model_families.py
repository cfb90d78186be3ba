"""Small random models of the shapes that users bring, with tokenizers that render chats.

Their logits are not flat, so that temperature, samples and adapters matter; every bias and norm
that tells the families apart is random as well.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlhf_ray.models.loading import save_model

Family = Literal["llama-3", "qwen2.5", "qwen3"]
FAMILIES: tuple[Family, ...] = ("llama-3", "qwen2.5", "qwen3")

TEXTS = [
    f"Question {number}: why does the {noun} {verb}? Answer: because {reason}."
    for number, (noun, verb, reason) in enumerate(
        (noun, verb, reason)
        for noun in ("kettle", "grinder", "filter", "pump")
        for verb in ("leak", "whistle", "stop", "hum")
        for reason in ("it is worn", "water is hard", "it is new", "steam must leave")
    )
]

_LLAMA_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
)
_QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def build(
    family: Family, folder: str | Path, *, texts: Sequence[str] = TEXTS, max_length: int = 256
) -> str:
    """Write a model folder; same arguments, same weights.

    Args:
        family: llama-3 (grouped keys, scaled rotary embedding, output layer of its own), qwen2.5
            (biases on q, k, v; tied embeddings) or qwen3 (norms on q and k; heads wider than
            the model).
        folder: where it goes.
        texts: what the tokenizer learns its merges from.
        max_length: positions.

    Returns:
        The folder.
    """
    tokenizer = _tokenizer(family, texts)
    ids = tokenizer.get_vocab()
    common = _SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": max_length}
    if family == "llama-3":
        ends = [ids["<|end_of_text|>"], ids["<|eot_id|>"]]
        model: Any = LlamaForCausalLM(_llama_config(common, ids, ends))
        generation = GenerationConfig(bos_token_id=ids["<|begin_of_text|>"], eos_token_id=ends)
    else:
        ends = [ids["<|im_end|>"], ids["<|endoftext|>"]]
        special = {"bos_token_id": None, "eos_token_id": ends[0], "tie_word_embeddings": True}
        if family == "qwen2.5":
            model = Qwen2ForCausalLM(Qwen2Config(**common, **special))
        else:
            wide = common | {"hidden_size": 96, "head_dim": 32}
            model = Qwen3ForCausalLM(Qwen3Config(**wide, **special))
        generation = GenerationConfig(eos_token_id=ends, pad_token_id=ids["<|endoftext|>"])
    _randomise(model)
    model.generation_config = generation
    save_model(model, tokenizer, folder)
    return str(folder)


def _llama_config(common: dict[str, Any], ids: dict[str, int], ends: list[int]) -> LlamaConfig:
    return LlamaConfig(
        **common,
        bos_token_id=ids["<|begin_of_text|>"],
        eos_token_id=ends,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )


def _randomise(model: Any) -> None:
    """Random weights, such that 4 bits for each of the untied model's change little.

    An output layer of its own lets the embeddings outweigh what the blocks add to them.
    """
    tied = model.config.tie_word_embeddings
    deviations = {"model.embed_tokens": 0.2 if tied else 1.0, "lm_head": 0.2}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1 + 0.1 * noise)
            else:
                module = name.removesuffix(".weight")
                weight.copy_(noise * deviations.get(module, 0.08 if tied else 0.04))


def _tokenizer(family: Family, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    is_llama = family == "llama-3"
    special = _LLAMA_TOKENS if is_llama else _QWEN_TOKENS
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if is_llama:  # writes its first token before every text, as the real one does
        bos = "<|begin_of_text|>"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    names = (
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
        if is_llama
        else {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = _LLAMA_TEMPLATE if is_llama else _QWEN_TEMPLATE
    return fast
