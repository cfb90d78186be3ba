"""Questions and answers of Stack Exchange: their scores, their Markdown, and pairs of answers."""

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

from bs4 import BeautifulSoup, Tag
from markdownify import MarkdownConverter

MAX_DEPTH = 100
"""Most elements of a post inside each other."""


@dataclass(frozen=True)
class Answer:
    """One answer."""

    id: int
    """The post's id."""
    body_html: str
    """HTML as in the dump."""
    score: int
    """From `answer_score`: log2 of the upvotes, acceptance, downvotes."""
    accepted: bool
    """Whether the asker accepted it."""


@dataclass(frozen=True)
class Question:
    """One question with all its answers."""

    id: int
    """The post's id."""
    title: str
    """Plain text; may be empty."""
    body_html: str
    """HTML as in the dump."""
    tags: tuple[str, ...]
    """Without angle brackets."""
    answers: tuple[Answer, ...]
    """In the order of writing; may be empty."""

    @property
    def text(self) -> str:
        """The question as models see it: title, blank line, body in Markdown."""
        parts = (self.title.strip(), html_to_markdown(self.body_html))
        return "\n\n".join(part for part in parts if part)


def tag_names(tags: str) -> tuple[str, ...]:
    """Return the names in a question's Tags: ``<a><b>`` in old dumps, ``|a|b|`` in new ones."""
    return tuple(filter(None, tags.replace("<", "|").replace(">", "|").split("|")))


def answer_score(upvotes: int, accepted: bool) -> int:
    """Return an answer's score as in StackLLaMA (after Askell et al. 2021, arXiv:2112.00861).

    ``round(log2(1 + upvotes))``, plus 1 if accepted. Below zero votes it is -1, accepted or not:
    the published rule leaves this case open, and a model should not learn from an answer that
    readers voted down.
    """
    if upvotes < 0:
        return -1
    return round(math.log2(1 + upvotes)) + int(accepted)


def html_to_markdown(html: str) -> str:
    """Convert a post's HTML to Markdown: ``<pre><code>`` becomes a fence, links and lists stay.

    A fence names its language where the post does (``<pre class="lang-py ...">``). A post whose
    elements are nested more than `MAX_DEPTH` deep, which only a broken one is, gives an empty text.
    """
    soup = BeautifulSoup(html, "html.parser", element_classes={Tag: _Element})
    # Not by Python's own limit: that one counts the caller's calls too.
    if html.count("<") > MAX_DEPTH and _depth(soup) > MAX_DEPTH:
        return ""
    markdown = _CONVERTER.convert_soup(soup)
    return markdown.strip()


class _Element(Tag):
    """An element that finds a parent fast: markdownify asks each one for a ``<pre>`` around it."""

    def find_parent(self, name: Any = None, attrs: Any = None, **kwargs: Any) -> Tag | None:
        if not isinstance(name, str) or attrs or kwargs:
            return super().find_parent(name, attrs, **kwargs)
        return next((parent for parent in self.parents if parent.name == name), None)


def _depth(soup: BeautifulSoup) -> int:
    depth, level = -1, [soup]
    while level:
        depth += 1
        level = [child for tag in level for child in tag.children if isinstance(child, Tag)]
    return depth


def _code_language(pre: Tag) -> str:
    """Return the language that the post gives to a block of code; empty if it gives none."""
    names = [name for name in pre.get("class") or [] if name.startswith("lang-")]
    return names[0].removeprefix("lang-") if names else ""


_CONVERTER = MarkdownConverter(
    heading_style="ATX",
    bullets="-",
    escape_asterisks=False,
    escape_underscores=False,
    code_language_callback=_code_language,
)


def sample_pairs(question: Question, max_pairs: int, seed: int) -> list[tuple[Answer, Answer]]:
    """Return unique pairs of answers whose scores differ, the better one first.

    Args:
        question: a question with its answers.
        max_pairs: if more pairs are possible, this many are drawn without replacement.
        seed: seed of the run; with the question's id it fixes the draw.
    """
    pairs = [
        (one, other) if one.score > other.score else (other, one)
        for one, other in itertools.combinations(question.answers, 2)
        if one.score != other.score
    ]
    if len(pairs) <= max_pairs:
        return pairs
    return random.Random(f"pairs:{seed}:{question.id}").sample(pairs, max_pairs)
