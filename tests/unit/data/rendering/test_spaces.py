"""Spaces between a prompt and its answer, by tokenizers that put or drop one before each text."""

from functools import partial
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actors.generator import Generator
from rlhf_ray.algorithms.logprobs import SamplingRule
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.data.rendering.tokens import decode_after, encode, without_prefix
from rlhf_ray.engines.fake import FakeEngine
from rlhf_ray.engines.protocols import Sampled
from rlhf_ray.models.stop_conditions import CONTEXT, StopConditions
from rlhf_ray.types import Prompt, SampleRequest

WORDS = ("▁Be", "▁be", "▁▁", "▁B", "▁b")
CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content }}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def sentencepiece(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of Llama 1 (prepend) or of later ones (always, first, never)."""
    letters = [chr(code) for code in range(33, 127)]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    vocab = {name: index for index, name in enumerate([*names, "Be", "be", *WORDS])}
    merges = [("B", "e"), ("b", "e"), ("▁", "Be"), ("▁", "be"), ("▁", "▁"), ("▁", "B"), ("▁", "b")]
    model = models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>")
    built = Tokenizer(model)
    if kind == "prepend":
        space = normalizers.Replace(" ", "▁")
        built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
    else:
        built.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)]
        )
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [] if kind == "never" else [decoders.Strip(" ", 1, 0)]
    built.decoder = decoders.Sequence([*spaces, *strip])
    return PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_level(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    built = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(params=["prepend", "always", "first", "never", "byte_level"])
def spaced(request: Any, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return byte_level(tokenizer) if request.param == "byte_level" else sentencepiece(request.param)


@pytest.mark.parametrize("prompt", ["Answer: ", "Answer:", "Answer:\n", "Answer:  "])
@pytest.mark.parametrize("answer", ["Be", " Be", "  Be", "\n Be", "Be be"])
def test_an_answer_gets_no_space_of_its_own(
    spaced: PreTrainedTokenizerFast, prompt: str, answer: str
) -> None:
    row = Renderer(spaced).full(prompt, answer, ended=False)
    text = spaced.decode(row.token_ids).removeprefix(" ")
    assert text == prompt + answer
    given, answered = row.token_ids[: row.num_prompt_tokens], row.token_ids[row.num_prompt_tokens :]
    assert given == encode(spaced, [prompt])[0]
    # What is sampled is read as it was meant, and tokenised again as it was sampled.
    assert decode_after(spaced, given, answered) == answer


def test_the_answer_is_one_token_and_not_three(tokenizer: PreTrainedTokenizerFast) -> None:
    llama = sentencepiece("prepend")
    row = Renderer(llama).full("Answer: ", "Be", ended=False)
    answer = llama.convert_ids_to_tokens(row.token_ids[row.num_prompt_tokens :])
    assert (answer, encode(llama, [" Be"])[0][0]) == (["Be"], llama.get_vocab()["▁"])
    assert without_prefix(sentencepiece("never")) is None
    assert without_prefix(tokenizer) is None, "where nothing is put, nothing is built"


@pytest.mark.parametrize("kind", ["prepend", "always", "first"])
def test_chats_too(kind: str) -> None:
    llama = sentencepiece(kind)
    llama.chat_template = CHAT
    renderer = Renderer(llama)
    chat = [{"role": "user", "content": "Be?"}]
    first = [*chat, {"role": "assistant", "content": "Be."}, *chat]
    (row,) = renderer.tokenize([renderer.prompt_and_answer(first, "Be.", every_answer=True)])
    learnt = [t for t, is_learnt in zip(row.token_ids, row.answer_mask, strict=True) if is_learnt]
    assert llama.convert_ids_to_tokens(learnt) == ["▁Be", ".", "▁", "</s>"] * 2
    assert "[INST] Be? [/INST] Be. </s>" in llama.decode(row.token_ids)


def test_a_prompt_that_ends_within_a_character(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode(tokenizer, ["é!"])[0]
    assert decode_after(tokenizer, ids[:1], ids[1:]).endswith("!")
    assert decode_after(tokenizer, [], ids) == "é!"


@pytest.mark.parametrize("kind", ["prepend", "always", "first", "never"])
def test_a_stop_string_may_begin_with_a_space(kind: str) -> None:
    llama = sentencepiece(kind)
    (given,) = encode(llama, ["Answer:"])
    sampled = llama.convert_tokens_to_ids(["▁Be", "."])
    spell = partial(decode_after, llama, given[-CONTEXT:])
    stop, rule = StopConditions(9, (" Be",)), SamplingRule()
    assert stop.finish_reason(sampled[:1], 9, rule, spell) == "stop"
    assert StopConditions(9, ("  Be",)).finish_reason(sampled, 9, rule, spell) is None


@pytest.mark.parametrize("kind", ["prepend", "always", "first", "never"])
def test_a_rollout_reads_its_answer_with_the_space(kind: str) -> None:
    llama = sentencepiece(kind)
    (given,) = encode(llama, ["Answer:"])
    ids = llama.convert_tokens_to_ids(["▁Be", "</s>"])
    generator = Generator("generator-0", FakeEngine, lambda: llama)
    request = SampleRequest(0, Prompt("0", "Answer:", tuple(given)), seed=0)
    sampled = Sampled(np.array(ids), np.zeros(2, np.float32), "stop")
    assert generator._rollout(request, sampled, 1).text == " Be"
