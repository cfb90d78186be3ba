"""Whether a text does what an instruction asked for: rules that a program can check.

After IFEval (Zhou et al. 2023, arXiv:2311.07911). Each check is a pure function of the stripped
text and the instruction's arguments; an empty text passes none. Words are as in `words`.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any


def words(text: str) -> list[str]:
    """Runs of letters, digits and apostrophes of any script.

    Example:
        >>> words("Don't -- stop, 2 go.")
        ["Don't", 'stop', '2', 'go']
    """
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text)


def words_begin_with(text: str, letter: str) -> bool:
    """Every word begins with the letter, large or small."""
    found = words(text)
    return bool(found) and all(word.lower().startswith(letter.lower()) for word in found)


def at_most_words(text: str, num: int) -> bool:
    """There are so many words or fewer, and at least one."""
    return 1 <= len(words(text)) <= num


def at_least_words(text: str, num: int) -> bool:
    """There are so many words or more."""
    return len(words(text)) >= num


def contains(text: str, phrase: str) -> bool:
    """The phrase is there as whole words, large or small."""
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None


def avoids(text: str, phrase: str) -> bool:
    """The phrase is not there as whole words, large or small."""
    return bool(words(text)) and not contains(text, phrase)


def ends_with(text: str, phrase: str) -> bool:
    """Nothing follows the phrase."""
    return text.endswith(phrase)


def starts_with(text: str, phrase: str) -> bool:
    """Nothing stands before the phrase."""
    return text.startswith(phrase)


def lower_case(text: str) -> bool:
    """There are letters, and none is a capital."""
    return text.islower()


def upper_case(text: str) -> bool:
    """There are letters, and all are capitals."""
    return text.isupper()


def valid_json(text: str) -> bool:
    """The whole text is one JSON object or list, in a code fence or not."""
    fenced = re.fullmatch(r"```(?:json)?\n(.*)\n```", text, re.DOTALL)
    try:
        value = json.loads(fenced.group(1) if fenced else text)
    except json.JSONDecodeError:
        return False
    return isinstance(value, dict | list)


def num_lines(text: str, num: int) -> bool:
    """There are exactly so many lines with something in them."""
    return len([line for line in text.splitlines() if line.strip()]) == num


CHECKS: Mapping[str, Callable[..., bool]] = {
    check.__name__: check
    for check in (
        words_begin_with,
        at_most_words,
        at_least_words,
        contains,
        avoids,
        ends_with,
        starts_with,
        lower_case,
        upper_case,
        valid_json,
        num_lines,
    )
}
"""Name of a check in an instruction -> what it does."""


def passes(text: str, check: str, args: Mapping[str, Any]) -> bool:
    """Whether an answer passes; white space around it does not count."""
    stripped = text.strip()
    return bool(stripped) and CHECKS[check](stripped, **args)
