"""Checks of instruction following: rules that a program can verify on a text.

After IFEval (Zhou et al. 2023, arXiv:2311.07911). Each check is a pure function of the stripped
text and the instruction's arguments; an empty text passes none. Words are as in `words`.
"""

import json
import re
from collections.abc import Callable, Mapping


def words(text: str) -> list[str]:
    """Return the runs of letters, digits and apostrophes of any script.

    Example:
        >>> words("Don't -- stop, 2 go.")
        ["Don't", 'stop', '2', 'go']
    """
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text)


def words_begin_with(text: str, letter: str) -> bool:
    """True if every word begins with the letter, in upper or lower case."""
    listed = words(text)
    return bool(listed) and all(word.lower().startswith(letter.lower()) for word in listed)


def at_most_words(text: str, num: int) -> bool:
    """True if there are 1 to ``num`` words."""
    return 1 <= len(words(text)) <= num


def at_least_words(text: str, num: int) -> bool:
    """True if there are at least ``num`` words."""
    return len(words(text)) >= num


def contains(text: str, phrase: str) -> bool:
    """True if the phrase occurs as whole words, in any case."""
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None


def avoids(text: str, phrase: str) -> bool:
    """True if there are words, but not the phrase as whole words, in any case."""
    return bool(words(text)) and not contains(text, phrase)


def ends_with(text: str, phrase: str) -> bool:
    """True if nothing follows the phrase."""
    return text.endswith(phrase)


def starts_with(text: str, phrase: str) -> bool:
    """True if nothing comes before the phrase."""
    return text.startswith(phrase)


def lower_case(text: str) -> bool:
    """True if there are letters, all in lower case."""
    return text.islower()


def upper_case(text: str) -> bool:
    """True if there are letters, all in upper case."""
    return text.isupper()


def valid_json(text: str) -> bool:
    """True if the whole text is one JSON object or list, in a code fence or not."""
    fenced = re.fullmatch(r"```(?:json)?\n(.*)\n```", text, re.DOTALL)
    try:
        value = json.loads(fenced.group(1) if fenced else text)
    except json.JSONDecodeError:
        return False
    return isinstance(value, dict | list)


def num_lines(text: str, num: int) -> bool:
    """True if there are exactly ``num`` lines that are not blank."""
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
"""Name of a check in an instruction -> its function."""


def passes(text: str, check: str, args: Mapping[str, object]) -> bool:
    """Return whether an answer passes; white space around it is ignored."""
    stripped = text.strip()
    return bool(stripped) and CHECKS[check](stripped, **args)
