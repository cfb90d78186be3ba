"""ROUGE's F1, worked by hand."""

import asyncio
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest

from rlhf_ray.config.rewards import RougeSourceConfig
from rlhf_ray.errors import DataError
from rlhf_ray.rewards.rouge import RougeSource, rouge, words
from rlhf_ray.types import Rollout

REFERENCE = "police killed the gunman"


@pytest.mark.parametrize(
    ("variant", "text", "f1"),
    [
        # Words police, the, gunman of 4 and 4: P = R = 3/4.
        ("rouge1", "police kill the gunman", 3 / 4),
        # Pairs: "the gunman" of 3 and 3.
        ("rouge2", "police kill the gunman", 1 / 3),
        ("rougeL", "police kill the gunman", 3 / 4),
        # The same words in another order: all single words, "the gunman", and a run of 2.
        ("rouge1", "the gunman killed police", 1.0),
        ("rouge2", "the gunman killed police", 1 / 3),
        ("rougeL", "the gunman killed police", 2 / 4),
        # Of unequal length, P = 2/2 and R = 2/4: F1 = 2 * 1 * .5 / 1.5.
        ("rouge1", "The GUNMAN!", 2 / 3),
        ("rougeL", "gunman the", 1 / 3),  # LCS 1 of 2 and of 4: 2 / 6
        # A word counts no more often than in the reference: "the" once of 3; 2 * 1 / (3 + 4).
        ("rouge1", "the the the", 2 / 7),
        ("rouge2", "police", 0.0),
        ("rouge1", "", 0.0),
        ("rougeL", "", 0.0),
        ("rougeL", REFERENCE, 1.0),
    ],
)
def test_by_hand(variant: str, text: str, f1: float) -> None:
    assert rouge(variant, text, REFERENCE) == pytest.approx(f1)
    assert rouge(variant, REFERENCE, text) == pytest.approx(f1)  # F1 is the same both ways


def test_words_of_any_script_without_case_or_signs() -> None:
    assert words("Größe: 3.5 – naïve_x 日本") == ["größe", "3", "5", "naïve", "x", "日", "本"]
    assert words("हिन्दी में") == ["हिन्दी", "में"], "marks belong to their letters"
    assert words("สวัสดี") == ["ส", "วั", "ส", "ดี"]
    assert words("ラーメン、食べる") == list("ラーメン食べる")
    assert words("한국어 문장") == ["한국어", "문장"], "Korean has spaces"


@pytest.mark.parametrize(
    ("text", "reference", "shared", "total"),
    [
        ("今天天气很好", "今天天气真好", 5, 12),
        ("東京に行きます。", "東京へ行きます", 6, 14),
        ("GPT很好", "GPT真好", 2, 6),
        ("สวัสดีครับ", "สวัสดีค่ะ", 4, 13),
    ],
)
def test_scripts_without_spaces_are_compared_by_characters(
    text: str, reference: str, shared: int, total: int
) -> None:
    assert rouge("rouge1", text, reference) == pytest.approx(2 * shared / total)
    assert rouge("rougeL", text, reference) == pytest.approx(2 * shared / total)


def test_equal_texts_of_other_code_points_are_equal() -> None:
    for text in ("café déjà vu", "がぎぐ", "한국어"):
        assert rouge("rougeL", unicodedata.normalize("NFD", text), text) == 1
    assert words("コーヒーabc ㄅㄆ ꀀꀁ") == ["コ", "ー", "ヒ", "ー", "abc", "ㄅ", "ㄆ", "ꀀ", "ꀁ"]


def score(rollout: Rollout, **keys: Any) -> list[float | None]:
    source = RougeSource(RougeSourceConfig(type="rouge", **keys))
    return asyncio.run(source.score([rollout]))


def test_of_several_references_the_best_counts(rollout: Callable[..., Rollout]) -> None:
    response = rollout("a b", answer=["x y", "a b c d"])
    assert score(response, column="answer", variant="rouge1") == [pytest.approx(2 / 3)]


@pytest.mark.parametrize("reference", [42, [7, 42], ("42",), "42"])
def test_a_reference_of_any_plain_type(reference: Any, rollout: Callable[..., Rollout]) -> None:
    assert score(rollout("42", answer=reference), column="answer") == [1.0]


def test_a_null_among_references_is_no_word(rollout: Callable[..., Rollout]) -> None:
    assert score(rollout("None", answer=[None, "a"]), column="answer") == [0.0]
    assert score(rollout("nan", answer=["a", float("nan")]), column="answer") == [0.0]
    for nothing in ([None], float("nan"), [float("nan"), None]):
        with pytest.raises(DataError, match=r"'answer', which is .*(None|nan).* for prompt 7"):
            score(rollout("None", answer=nothing), column="answer")


def test_no_reference_in_a_list_is_refused(rollout: Callable[..., Rollout]) -> None:
    with pytest.raises(DataError, match="'answer', which is an empty list for prompt 7; give it"):
        score(rollout("42", answer=[]), column="answer")


def test_a_row_without_the_reference_is_refused(rollout: Callable[..., Rollout]) -> None:
    with pytest.raises(
        DataError,
        match=r"reads the column 'reference', which prompt 7 lacks; it "
        r"has answer",
    ):
        score(rollout("a", answer="b"))
