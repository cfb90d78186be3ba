"""The small tokenizer and Llama that are built where no model is given."""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_ray.config.model import TinyModelConfig
from rlhf_ray.errors import DataError
from rlhf_ray.models.loading import save_model

PAD, EOS = "<|pad|>", "<|eos|>"


def build(
    folder: str | Path, texts: Iterable[str], shape: TinyModelConfig, max_length: int, seed: int
) -> None:
    """Write a random Llama and a tokenizer trained on ``texts``; same arguments, same bytes.

    Raises:
        DataError: there are no texts.
    """
    tokenizer = _train_tokenizer(texts, shape.vocab_size, max_length)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.get_vocab()[EOS],
        pad_token_id=tokenizer.get_vocab()[PAD],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    save_model(model, tokenizer, folder)


def _train_tokenizer(
    texts: Iterable[str], vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text is encoded without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    num_texts = 0

    def counted() -> Iterable[str]:
        nonlocal num_texts
        for text in texts:
            num_texts += 1
            yield text

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(counted(), trainer)
    if not num_texts:
        raise DataError("No texts to build the tiny model's tokenizer from; check data.pretrain")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="right",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
