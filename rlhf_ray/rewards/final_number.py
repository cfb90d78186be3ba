"""Rewards for sums with one right number, as in GSM8K (Cobbe et al. 2021, arXiv:2110.14168).

Functions with TRL's signature: name them as `rewards` of `type: function`. The data's ``answer``
may be a whole solution or the number alone.
"""

import re
from collections.abc import Sequence
from decimal import Decimal

MARK = "####"
"""Stands before the final number, in the data and in what the model is asked to write."""

_NUMBER = re.compile(r"[-−]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|[-−]?\.[0-9]+")
_LEAD = re.compile(r"[^\w.\n−-]*([-−]?)[^\w.\n−-]*")
"""What may stand between the mark and the digits: a sign, and currency signs, stars, brackets."""


def marked(completions: Sequence[object], answer: Sequence[object], **_: object) -> list[float]:
    """Return 1 where the number after the last ``####`` is the answer's, else 0.

    Raises:
        ValueError: an answer holds no number.
    """
    return _compare([marked_number(_text(each)) for each in completions], answer)


def last(completions: Sequence[object], answer: Sequence[object], **_: object) -> list[float]:
    """Return 1 where the last number of the text is the answer's, else 0: the form is not judged.

    Raises:
        ValueError: an answer holds no number.
    """
    return _compare([last_number(_text(each)) for each in completions], answer)


def marked_number(text: str) -> Decimal | None:
    """Return the number after the last ``####``; None if there is none, or not exactly one.

    A unit may follow it on its line, but no other number: a guess between two is no answer.

    Example:
        >>> marked_number("3 x 400 is 1,200. #### $1,200.00 a year")
        Decimal('1200.00')
        >>> marked_number("#### 3 or 4") is None
        True
    """
    _, mark, tail = text.rpartition(MARK)
    line = tail.strip().partition("\n")[0]
    lead = _LEAD.match(line) if mark else None
    number = _NUMBER.match(line, lead.end()) if lead else None
    if lead is None or number is None or re.search(r"[0-9]", line[number.end() :]):
        return None
    return _value(lead[1] + number[0])


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text; None if there is none."""
    numbers = _NUMBER.findall(text)
    return _value(numbers[-1]) if numbers else None


def _compare(numbers: Sequence[Decimal | None], answers: Sequence[object]) -> list[float]:
    return [
        float(number == _truth(str(answer)))
        for number, answer in zip(numbers, answers, strict=True)
    ]


def _truth(answer: str) -> Decimal:
    number = marked_number(answer) if MARK in answer else last_number(answer)
    if number is None:
        raise ValueError(f"the answer {answer[-100:]!r} holds no final number")
    return number


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", "").replace("−", "-"))


def _text(completion: object) -> str:
    """Return a completion's text; that of a chat is a list of one message."""
    if isinstance(completion, str):
        return completion
    assert isinstance(completion, Sequence)
    return str(completion[-1]["content"])
