"""Expected numbers are read off the texts."""

from decimal import Decimal

import pytest

from rlhf_ray.rewards.final_number import last, last_number, marked, marked_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("He pays 6 x 7 = <<6*7=42>>42. #### 42", "42"),
        ("#### 42.", "42"),
        ("#### 42.0", "42"),
        ("####42", "42"),
        ("####\n42", "42"),
        ("#### 42\n\nI hope that 7 of you agree.", "42"),
        ("#### 42 apples", "42"),
        ("#### 50%", "50"),
        ("#### 1,234,567", "1234567"),
        ("#### $1,200.50", "1200.50"),
        ("#### €3", "3"),
        ("#### -5", "-5"),
        ("#### −5", "-5"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### **18**", "18"),
        ("#### \\(18\\)", "18"),
        ("#### .5", "0.5"),
        ("#### 007", "7"),
        ("#### 3\nNo, once more: #### 4", "4"),
    ],
)
def test_the_number_after_the_last_mark_is_read(text: str, number: str) -> None:
    assert marked_number(text) == Decimal(number)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "42",
        "The answer is 42",
        "####",
        "#### ",
        "#### forty-two",
        "#### x = 42",
        "#### 42 or 43",
        "#### 1/2",
        "#### 1e3",
        "#### 1,23",
        "#### 12,3456",
        "#### 3.4.5",
        "#### 42 ####",
        "### 42",
    ],
)
def test_what_is_not_exactly_one_number_after_the_mark_is_no_answer(text: str) -> None:
    assert marked_number(text) is None


def test_the_last_number_needs_no_mark() -> None:
    assert last_number("It costs $3, so four cost $1,012.50 in all.") == Decimal("1012.5")
    assert last_number("no idea") is None


def test_a_response_is_right_or_wrong_by_value() -> None:
    answer = ["6 x 200 = <<6*200=1200>>1,200\n#### 1,200"] * 4
    completions = ["#### 1200.00", "it is 1200", "#### 120", "#### $1,200"]
    assert marked(completions, answer, question=["?"] * 4) == [1, 0, 0, 1]
    assert last(completions, answer) == [1, 1, 0, 1]


def test_chats_and_bare_answers_are_read_alike() -> None:
    chat = [{"role": "assistant", "content": "#### 72"}]
    assert marked([chat, chat], ["72", 72]) == [1, 1]


def test_a_row_without_a_number_is_named() -> None:
    with pytest.raises(ValueError, match="holds no final number"):
        marked(["#### 1"], ["#### none"])
