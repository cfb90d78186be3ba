"""How texts and numbers of a run are shown: nothing in them is ever markup, or hidden."""

import math
import re
from functools import cache
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from rlhf_ray.observability.samples.hidden import HIDDEN, code_point, unhidden

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

SHORT = 160
"""Characters of an excerpt."""


def visible(text: object) -> Markup:
    """Return a text as HTML, with characters that act or hide shown by their number."""
    return Markup(HIDDEN.sub(_shown, str(escape(str(text)))))


def markdown(text: str) -> Markup:
    """Return a text in Markdown as HTML that holds none of the text's own.

    Links and images stay as they were written: nothing leads or reaches elsewhere, and an address
    is seen. Hidden characters are shown by their number.
    """
    return Markup(_parser().render(unhidden(text)))


@cache
def _parser() -> "MarkdownIt":
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False, "breaks": True})
    parser.enable(["table", "strikethrough"])
    # A definition of a link's address is not shown at all, if it is one.
    return parser.disable(["link", "image", "autolink", "reference", "html_block", "html_inline"])


def excerpt(text: object) -> Markup:
    """Return the beginning of a text on one line."""
    line = " ".join(str(text)[: 2 * SHORT].split(" ")).replace("\n", " ⏎ ")
    return visible(line if len(line) <= SHORT else f"{line[:SHORT]}…")


def figure(value: object) -> str:
    """Return a number with three digits or more; a dash where there is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return "–"
    if float(value).is_integer():
        return f"{value + 0:,.0f}"  # and not -0
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _shown(match: re.Match[str]) -> str:
    return f'<span class="hidden-char">{code_point(match)}</span>'
