import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from rlhf_ray.data.rendering import packing
from rlhf_ray.data.rendering.packing import (
    IGNORED,
    concatenated,
    isolated,
    labels_of,
    pack,
    unpacked,
)

PAD = 99
SHAPE = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


class TestPack:
    def test_texts_are_joined_by_eos_and_the_remainder_is_dropped(self) -> None:
        # 1 2 3 E | 4 5 E 6 | 7 8 9 E | 10 E
        assert pack([[1, 2, 3], [4, 5], [6, 7, 8, 9], [10]], block_size=4, eos_id=0) == [
            [1, 2, 3, 0],
            [4, 5, 0, 6],
            [7, 8, 9, 0],
        ]

    def test_a_long_text_fills_many_blocks(self) -> None:
        assert pack([list(range(1, 11))], block_size=4, eos_id=0) == [[1, 2, 3, 4], [5, 6, 7, 8]]

    def test_nothing_to_pack(self) -> None:
        assert pack([], block_size=4, eos_id=0) == []
        assert pack([[1]], block_size=4, eos_id=0) == []

    def test_block_size_must_be_positive(self) -> None:
        with pytest.raises(ValueError, match="at least 1, got 0"):
            pack([[1]], block_size=0, eos_id=0)


def test_concatenation_carries_what_is_learnt_along() -> None:
    documents = [([1, 2, 0], [0, 1, 1]), ([3, 4, 5, 0], [1, 1, 0, 1])]
    blocks = list(concatenated(documents, block_size=3))
    assert [block.input_ids for block in blocks] == [[1, 2, 0], [3, 4, 5]]
    assert [block.labels for block in blocks] == [[IGNORED, 2, 0], [3, 4, IGNORED]]


class TestIsolated:
    def test_texts_stay_whole_and_fill_the_fullest_block_with_room(self) -> None:
        lengths = [3, 4, 1, 2]
        documents = [([10 + i] * length, [1] * length) for i, length in enumerate(lengths)]
        blocks = list(isolated(documents, block_size=6, pad_id=PAD))
        # 10 10 10 | 11 11 11 11; then 12 beside the four, 13 beside the three.
        assert [block.input_ids for block in blocks] == [
            [10, 10, 10, 13, 13, PAD],
            [11, 11, 11, 11, 12, PAD],
        ]
        assert [block.position_ids for block in blocks] == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]]
        assert [block.labels for block in blocks] == [
            [IGNORED, 10, 10, IGNORED, 13, IGNORED],
            [IGNORED, 11, 11, 11, IGNORED, IGNORED],
        ]

    def test_what_is_not_learnt_has_no_label(self) -> None:
        (block,) = isolated([([1, 2, 3, 4], [1, 0, 1, 1])], block_size=4, pad_id=PAD)
        assert block.labels == [IGNORED, IGNORED, 3, 4]

    def test_a_long_text_is_cut_into_pieces_of_its_own(self) -> None:
        blocks = list(isolated([(list(range(5)), [1] * 5)], block_size=3, pad_id=PAD))
        assert [block.input_ids for block in blocks] == [[0, 1, 2], [3, 4, PAD]]
        assert blocks[1].position_ids == [0, 1, 0]

    def test_few_blocks_are_open_and_no_text_is_lost(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(packing, "MAX_OPEN_BLOCKS", 2)
        documents = [([i] * (1 + i * 7 % 5), [1] * (1 + i * 7 % 5)) for i in range(40)]
        blocks = list(isolated(documents, block_size=6, pad_id=PAD))
        found = sorted(i for block in blocks for i in block.input_ids if i != PAD)
        assert found == sorted(i for token_ids, _ in documents for i in token_ids)
        assert {len(block.input_ids) for block in blocks} == {6}


def test_unpacked_texts_have_a_block_each_and_long_ones_several() -> None:
    documents = [([1, 2], [1, 1]), ([3, 4, 5, 6], [0, 1, 0, 1])]
    blocks = list(unpacked(documents, block_size=3))
    assert [block.input_ids for block in blocks] == [[1, 2], [3, 4, 5], [6]]
    assert [block.labels for block in blocks] == [[IGNORED, 2], [IGNORED, 4, IGNORED], [IGNORED]]
    assert [block.position_ids for block in blocks] == [[0, 1], [0, 1, 2], [0]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_a_packed_text_gives_the_logits_that_it_gives_alone(
    config: type[PretrainedConfig], attention: str
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SHAPE), attn_implementation=attention).eval()
    texts = [torch.randint(0, PAD, (length,)).tolist() for length in (7, 5, 9, 1, 6)]
    blocks = list(isolated([(text, [1] * len(text)) for text in texts], 16, PAD))
    assert len(blocks) == 2
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([block.input_ids for block in blocks]),
            position_ids=torch.tensor([block.position_ids for block in blocks]),
            use_cache=False,
        ).logits
        for row, block in enumerate(blocks):
            starts = [i for i, position in enumerate(block.position_ids) if position == 0]
            for start, end in zip(starts, [*starts[1:], 16], strict=True):
                alone = model(input_ids=torch.tensor([block.input_ids[start:end]])).logits[0]
                torch.testing.assert_close(logits[row, start:end], alone, atol=1e-5, rtol=1e-4)
        # Without the places of its texts, the second text of a block would see the first.
        joined = model(input_ids=torch.tensor([blocks[0].input_ids])).logits[0]
    assert (joined[-1] - logits[0, -1]).abs().max() > 1e-3


def test_labels() -> None:
    assert labels_of([5, 6, 7], [1, 0, 1]) == [5, IGNORED, 7]
