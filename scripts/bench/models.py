"""Models, prompts and lengths of the rows: random, from fixed seeds, the same on both sides."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_ray.config.model import TinyModelConfig
from rlhf_ray.models import tiny
from rlhf_ray.models.loading import load_tokenizer, save_model

PROMPT_TOKENS = 16
NUM_PROMPTS = 64
MEAN_LENGTH, MAX_LENGTH = 32, 256
"""Of skewed responses, which are geometric."""
LORA_RANK = 16
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Size:
    """A model's shape."""

    hidden: int
    layers: int
    inner: int
    heads: int
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """Name of the data type in a config."""
        return str(self.dtype).removeprefix("torch.")


SMALL = Size(256, 4, 560, 4)
"""2.9 million parameters."""
MIDDLE = Size(512, 7, 1152, 8)
"""20 million."""
LARGE = Size(2048, 16, 5632, 16, torch.bfloat16)
"""0.8 billion, for a GPU."""


def write(folder: Path, size: Size, seed: int = 0) -> str:
    """Write a policy's base with a tokenizer of single bytes; return its folder.

    After each token the end token has a probability of about 1 / `MEAN_LENGTH`, whatever came
    before: the first feature of all embeddings is the same and large, and the end token's row of
    the head reads it alone.
    """
    tiny.build(folder, [LETTERS], TinyModelConfig(vocab_size=300, hidden_size=32), 512, seed)
    tokenizer = load_tokenizer(str(folder))
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_shape(size, len(tokenizer), tokenizer.eos_token_id)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        head_VD = model.lm_head.weight
        for token in (tokenizer.eos_token_id, tokenizer.pad_token_id):
            head_VD[token] = 0.0
        head_VD[tokenizer.pad_token_id, 0] = -1.0  # never sampled: TRL takes it for an end
        ids_BS = torch.randint(2, len(tokenizer), (4, 64))
        hidden_ND = model.model(ids_BS).last_hidden_state.flatten(0, 1)
        others_N = (hidden_ND @ head_VD.T).logsumexp(-1)  # the end token's logit is 0 here
        wanted_N = others_N - torch.log(torch.tensor(MEAN_LENGTH - 1.0))
        head_VD[tokenizer.eos_token_id, 0] = (wanted_N / hidden_ND[:, 0]).mean()
    save_model(model.to(size.dtype), tokenizer, folder)
    return str(folder)


def write_reward_model(folder: Path, base: str, size: Size, seed: int = 1) -> str:
    """Write a classifier of a base's shape; return its folder."""
    tokenizer = load_tokenizer(base)
    torch.manual_seed(seed)
    shape = _shape(size, len(tokenizer), tokenizer.eos_token_id)
    shape.num_labels = 1
    shape.pad_token_id = tokenizer.pad_token_id
    save_model(LlamaForSequenceClassification(shape).to(size.dtype), tokenizer, folder)
    return str(folder)


def _shape(size: Size, vocabulary: int, eos: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def write_prompts(path: Path, count: int = NUM_PROMPTS, seed: int = 0) -> str:
    """Write prompts of `PROMPT_TOKENS` letters, each a token; return the file."""
    texts = prompts(count, seed)
    lines = [json.dumps({"prompt": text}) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def prompts(count: int, seed: int = 0) -> list[str]:
    """Return different prompts of random letters."""
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(LETTERS), PROMPT_TOKENS)) for _ in range(count)]


def skewed_lengths(count: int, seed: int) -> list[int]:
    """Return lengths of responses, geometric of mean `MEAN_LENGTH`, cut at `MAX_LENGTH`."""
    drawn = np.random.default_rng(seed).geometric(1 / MEAN_LENGTH, count)
    return [int(length) for length in np.minimum(drawn, MAX_LENGTH)]


def equal_lengths(count: int, length: int = 64) -> Sequence[int]:
    """Return lengths of responses that all run to the limit."""
    return [length] * count
