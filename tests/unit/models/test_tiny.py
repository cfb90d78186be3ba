import hashlib
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_ray.config.model import TinyModelConfig
from rlhf_ray.errors import DataError
from rlhf_ray.models import tiny

SHAPE = TinyModelConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_heads=2)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_same_arguments_write_the_same_bytes_and_another_seed_other_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tiny.build(tmp_path / name, ["some text", "more text"], SHAPE, max_length=64, seed=seed)
    first, second, third = (digests(tmp_path / name) for name in "abc")
    assert first == second
    assert {name for name in first if first[name] != third[name]} == {"model.safetensors"}


@pytest.mark.parametrize(
    "text",
    ["", " ", "Héllo  <b>\n\n\t你好 😀 don't ```py\nx = 1\n```", "\x00\x7f", "a  b", "Answer: "],
)
def test_tokenizer_returns_any_text_unchanged(base: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_and_configs_agree(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|eos|>")
    assert tokenizer.bos_token is None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for config in (model.config, model.generation_config):
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id
    assert not model.config.tie_word_embeddings
    assert model.config.vocab_size == len(tokenizer) == 300


def test_no_texts_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No texts"):
        tiny.build(tmp_path, [], SHAPE, max_length=64, seed=0)
