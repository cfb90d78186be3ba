"""Random models of the checks, made from configs; nothing is downloaded."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from gpu_checks.lines import Place
from rlhf_ray.config.model import TinyModelConfig
from rlhf_ray.models import tiny
from rlhf_ray.models.loading import load_tokenizer, save_model

TEXTS = [f"Question: why does pump {i} leak? Answer: because valve {i} is worn." for i in range(99)]
MAX_LENGTH = 1024
SMALL = LlamaConfig(
    vocab_size=512,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    max_position_embeddings=MAX_LENGTH,
)
"""Eight heads of 64: kernels take them, and up to eight GPUs can share them."""
SEVEN_B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=MAX_LENGTH,
)
"""The shape of Llama 7B; 6.7 billion parameters."""
LOGITS = 3.0
"""Deviation of the logits: flat ones would hide what layers compute."""


def small(place: Place) -> str:
    """Return the folder of a model of 5 million parameters."""
    return _made(place, "small", lambda folder: _write(folder, SMALL, torch.float32))


def large(place: Place, really: bool = False) -> str:
    """Return the folder of a model as large as Llama 7B; of a small one where there is no GPU."""
    if not (place.has_gpu or really):
        return small(place)
    return _made(place, "7b", lambda folder: _write(folder, SEVEN_B, torch.bfloat16))


def reward_model(place: Place, base: str) -> str:
    """Return the folder of a reward model as large as a base."""

    def write(folder: Path) -> None:
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype="auto")
        save_model(model, load_tokenizer(base), folder)

    return _made(place, f"{Path(base).name}-reward", write)


def prompts(place: Place) -> str:
    """Return a file of prompts."""

    def write(folder: Path) -> None:
        rows = [json.dumps({"prompt": text.partition("Answer")[0]}) for text in TEXTS]
        (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")

    return str(Path(_made(place, "prompts", write)) / "prompts.jsonl")


def _write(folder: Path, shape: LlamaConfig, dtype: torch.dtype) -> None:
    """Write a model with random weights and a tokenizer that has fewer tokens than the model."""
    tiny.build(folder, TEXTS, TinyModelConfig(vocab_size=400, hidden_size=32), MAX_LENGTH, seed=0)
    tokenizer = load_tokenizer(str(folder))
    shape.eos_token_id, shape.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    shape.bos_token_id = None
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = LlamaForCausalLM(shape)
            model.lm_head.weight.data.normal_(std=LOGITS * shape.hidden_size**-0.5)
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(folder)


def _made(place: Place, name: str, write: Callable[[Path], None]) -> str:
    """Make a folder once; cases that need it at the same time each make it, and one is kept."""
    folder = place.folder / "models" / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        write(made)
        try:
            made.rename(folder)
        except OSError:  # another case was faster
            shutil.rmtree(made)
    return str(folder)
