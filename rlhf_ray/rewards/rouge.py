"""ROUGE: how much a text shares with a reference (Lin 2004, aclanthology.org/W04-1013).

Words are runs of letters and digits of any script, in lower case; there is no stemming.
"""

import re
from collections import Counter
from collections.abc import Sequence

from rlhf_ray.config.rewards import RougeSourceConfig
from rlhf_ray.errors import DataError
from rlhf_ray.rewards.source import column_of
from rlhf_ray.types import Rollout


def words(text: str) -> list[str]:
    """The words of a text.

    Example:
        >>> words("It's 3 o'clock")
        ['it', 's', '3', 'o', 'clock']
    """
    return re.findall(r"[^\W_]+", text.lower())


def rouge_n(candidate: Sequence[str], reference: Sequence[str], n: int) -> float:
    """F1 of the n-grams that both have, each counted as often as in the one with fewer."""
    ours, theirs = _ngrams(candidate, n), _ngrams(reference, n)
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


def rouge_l(candidate: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words."""
    return _f1(_longest_common(candidate, reference), len(candidate), len(reference))


def rouge(variant: str, candidate: str, reference: str) -> float:
    """F1 in [0, 1] of rouge1, rouge2 or rougeL; 0 where one text has no words."""
    ours, theirs = words(candidate), words(reference)
    if variant == "rougeL":
        return rouge_l(ours, theirs)
    return rouge_n(ours, theirs, int(variant.removeprefix("rouge")))


class RougeSource:
    """Rates by overlap with the reference text of each prompt's row; of several the best counts."""

    def __init__(self, config: RougeSourceConfig) -> None:
        self._config = config

    async def score(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """[N] F1.

        Raises:
            DataError: a row lacks the column, or has no text in it.
        """
        return [self._score(rollout) for rollout in rollouts]

    def _score(self, rollout: Rollout) -> float:
        config = self._config
        given = column_of(rollout.prompt, config.column, config.name)
        references = given if isinstance(given, (list, tuple)) else [given]
        if not references:
            raise DataError(
                f"rewards: {config.name} reads the column {config.column!r}, which is an empty "
                f"list for prompt {rollout.prompt.id}; give it a reference text or leave its row "
                "out"
            )
        return max(rouge(config.variant, rollout.text, str(text)) for text in references)


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, in memory of one row."""
    lengths = [0] * (len(b) + 1)
    for left in a:
        diagonal = 0
        for place, right in enumerate(b, 1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if left == right else max(above, lengths[place - 1])
            diagonal = above
    return lengths[-1]


def _f1(shared: int, ours: int, theirs: int) -> float:
    """Harmonic mean of shared / ours and shared / theirs."""
    return 2 * shared / (ours + theirs) if shared else 0.0
