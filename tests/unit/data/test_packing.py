import pytest

from rlhf_ray.data.packing import pack


def test_texts_are_joined_by_eos_and_the_remainder_is_dropped() -> None:
    # 1 2 3 E | 4 5 E 6 | 7 8 9 E | 10 E
    assert pack([[1, 2, 3], [4, 5], [6, 7, 8, 9], [10]], block_size=4, eos_id=0) == [
        [1, 2, 3, 0],
        [4, 5, 0, 6],
        [7, 8, 9, 0],
    ]


def test_a_long_text_fills_many_blocks() -> None:
    assert pack([list(range(1, 11))], block_size=4, eos_id=0) == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_nothing_to_pack() -> None:
    assert pack([], block_size=4, eos_id=0) == []
    assert pack([[1]], block_size=4, eos_id=0) == []


def test_block_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        pack([[1]], block_size=0, eos_id=0)
