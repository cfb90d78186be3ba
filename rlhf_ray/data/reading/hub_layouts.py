"""The two layouts in which Stack Exchange questions are shared as data sets.

One holds pairs (``question``, ``response_j`` preferred to ``response_k``), the other questions with
their scored ``answers``. Users' names and ids are left behind; the question's address is kept.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_ray.data import template
from rlhf_ray.data.reading.counts import BadRow
from rlhf_ray.data.reading.rows import Row, require_text
from rlhf_ray.data.stack_exchange.posts import Answer, Question, html_to_markdown, sample_pairs

# A post in HTML begins with a block; one in Markdown may show tags further on.
_HTML = re.compile(r"\s*<(p|pre|ul|ol|dl|h\d|hr|blockquote|div|table)\b[^>]*>", re.IGNORECASE)


def rows(row: Row, use: str, max_pairs: int, seed: int) -> Iterator[Row]:
    """What one row of either layout gives.

    Args:
        row: a pair, or a question with its answers.
        use: ``prompts``: the question; ``preferences``: pairs; else answers.
        max_pairs: most pairs drawn from one question's answers.
        seed: of that draw.

    Raises:
        BadRow: the row holds no text, or no answer with a score.
    """
    question = _markdown(require_text(row, "question"))
    columns = {
        "question_id": row.get("qid"),
        "question": question,
        "prompt": template.prompt(question),
        "link": _link(row.get("metadata")),
    }
    if use == "prompts":
        yield columns
    elif "answers" in row:
        yield from _from_answers(columns, _answers(row["answers"]), use, max_pairs, seed)
    else:
        better, worse = (
            _markdown(require_text(row, name)) for name in ("response_j", "response_k")
        )
        pair = {"chosen": better, "rejected": worse}
        yield columns | (pair if use == "preferences" else {"completion": better})


def _from_answers(
    columns: Mapping[str, Any], answers: Sequence[Answer], use: str, max_pairs: int, seed: int
) -> Iterator[Row]:
    identity = columns["question_id"]
    question = Question(identity if isinstance(identity, int) else 0, "", "", (), tuple(answers))
    pairs = sample_pairs(question, max_pairs, seed)
    if use == "preferences":
        for better, worse in pairs:
            yield {**columns, "chosen": better.body_html, "rejected": worse.body_html}
        if not pairs:
            yield {"_unused": "question_without_pairs"}
        return
    winners = {better.id for better, _ in pairs}
    for answer in answers:
        scored = {"score": answer.score, "preferred": answer.id in winners}
        yield {**columns, "completion": answer.body_html, **scored}


def _answers(given: Any) -> list[Answer]:
    """Answers with a text and a finite score, their text in Markdown."""
    if not given:
        raise BadRow("question_without_answers")
    answers = []
    for number, answer in enumerate(given):
        score, text = answer.get("pm_score"), answer.get("text")
        is_number = isinstance(score, (int, float)) and math.isfinite(score)
        if is_number and isinstance(text, str) and text.strip():
            body, selected = _markdown(text), bool(answer.get("selected"))
            answers.append(Answer(number, body, round(score), selected))
    if not answers:
        raise BadRow("no_scored_answer", "no answer has both a text and a finite pm_score")
    return answers


def _markdown(text: str) -> str:
    """Markdown, whether the text is in HTML or already in Markdown."""
    return html_to_markdown(text) if _HTML.match(text) else text.strip()


def _link(metadata: Any) -> str | None:
    """The question's address among those that the row lists (the others are of users and sites)."""
    addresses = metadata if isinstance(metadata, (list, tuple)) else []
    return next(
        (str(item) for item in addresses if re.search(r"/(questions|q)/\d", str(item))), None
    )
