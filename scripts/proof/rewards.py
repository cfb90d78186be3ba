"""A reward of a few lines: how often a word is said."""

import re
from collections.abc import Sequence
from typing import Any

WORD = "work"


def count_word(completions: Sequence[str], **_: Any) -> list[float]:
    """Count `WORD` in each response."""
    return [float(len(re.findall(rf"\b{WORD}\b", text))) for text in completions]
