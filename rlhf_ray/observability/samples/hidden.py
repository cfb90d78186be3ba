"""Characters that act or hide where a sample's text is shown: they are shown by their number."""

import re

HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]"
)
"""Control characters (of terminals, too), direction marks, and characters without width."""


def unhidden(text: str) -> str:
    """Return a text with its hidden characters as ``⟨U+202E⟩``."""
    return HIDDEN.sub(lambda match: f"⟨{code_point(match)}⟩", text)


def code_point(match: re.Match[str]) -> str:
    """Return the number of a character that was found."""
    return f"U+{ord(match.group()):04X}"
