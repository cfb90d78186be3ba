import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_ray.data.rendering.render import Renderer

CHATML = """
{%- if messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA3 = """
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""


def byte_model() -> Tokenizer:
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"<eos>": 256, "<pad>": 257, "ĠA": 258}
    model = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "A")]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and one merge, of a space with A, that only joined texts can show."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_model(), eos_token="<eos>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def renderer(tokenizer: PreTrainedTokenizerFast) -> Renderer:
    return Renderer(tokenizer)


@pytest.fixture
def chatml() -> PreTrainedTokenizerFast:
    """A tokenizer like that of Qwen's base models: turns end in a token that is not its eos."""
    model = byte_model()
    model.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def llama3() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 3's: it and its chat template begin every text with a token."""
    model = byte_model()
    names = ("<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    model.add_special_tokens([AddedToken(name) for name in names])
    begin = model.token_to_id("<|begin|>")
    model.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<|begin|>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = LLAMA3
    return tokenizer
