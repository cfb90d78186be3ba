"""ROUGE: the overlap of a text with a reference (Lin 2004, aclanthology.org/W04-1013).

Words are runs of letters and digits, in lower case; there is no stemming. In scripts that put no
spaces between words, a character with its marks is a word. Characters composed of several equal
the single ones.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence

import regex

from rlhf_ray.config.rewards import RougeSourceConfig
from rlhf_ray.data.reading.rows import given_values
from rlhf_ray.errors import DataError
from rlhf_ray.rewards.source import column_of
from rlhf_ray.types import Rollout

_UNSPACED = "".join(
    rf"\p{{{script}}}"
    for script in (
        *("Han", "Hiragana", "Katakana", "Bopomofo", "Yi", "Thai", "Lao", "Khmer", "Myanmar"),
        *("Tibetan", "Javanese", "Balinese", "Tai_Tham", "Tai_Le", "New_Tai_Lue", "Tai_Viet"),
    )
)
_UNSPACED += "ーｰ"  # the mark of long vowels is of no script
_WORD = regex.compile(rf"(?V1)[{_UNSPACED}]\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--[{_UNSPACED}]]+")


def words(text: str) -> list[str]:
    """Split a text into words.

    Example:
        >>> words("It's 3 o'clock")
        ['it', 's', '3', 'o', 'clock']
        >>> words("东京Tokyo")
        ['东', '京', 'tokyo']
    """
    return _WORD.findall(unicodedata.normalize("NFC", text.lower()))


def rouge_n(candidate: Sequence[str], reference: Sequence[str], n: int) -> float:
    """Return the F1 of shared n-grams, each counted as often as in the text with fewer."""
    ours, theirs = _ngrams(candidate, n), _ngrams(reference, n)
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


def rouge_l(candidate: Sequence[str], reference: Sequence[str]) -> float:
    """Return the F1 of the longest common subsequence of words."""
    return _f1(_longest_common(candidate, reference), len(candidate), len(reference))


def rouge(variant: str, candidate: str, reference: str) -> float:
    """Return the F1 in [0, 1] of rouge1, rouge2 or rougeL; 0 if one text has no words."""
    ours, theirs = words(candidate), words(reference)
    if variant == "rougeL":
        return rouge_l(ours, theirs)
    return rouge_n(ours, theirs, int(variant.removeprefix("rouge")))


class RougeSource:
    """Scores by overlap with the reference text in each prompt's row (the best of several)."""

    def __init__(self, config: RougeSourceConfig) -> None:
        self._config = config

    async def score(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return [N] F1 scores."""
        return [self._score(rollout) for rollout in rollouts]

    def _score(self, rollout: Rollout) -> float:
        config = self._config
        value = column_of(rollout.prompt, config.column, config.name)
        references = given_values(value)
        if not references:
            found = "an empty list" if value in ([], ()) else f"{value!r}"
            raise DataError(
                f"rewards: {config.name} reads the column {config.column!r}, which is {found} for "
                f"prompt {rollout.prompt.id}; give it a reference text or leave its row out"
            )
        return max(rouge(config.variant, rollout.text, str(text)) for text in references)


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, with memory for one row alone."""
    lengths = [0] * (len(b) + 1)
    for left in a:
        diagonal = 0
        for column, right in enumerate(b, 1):
            above = lengths[column]
            lengths[column] = diagonal + 1 if left == right else max(above, lengths[column - 1])
            diagonal = above
    return lengths[-1]


def _f1(shared: int, ours: int, theirs: int) -> float:
    """Return the harmonic mean of shared / ours and shared / theirs."""
    return 2 * shared / (ours + theirs) if shared else 0.0
