"""Layouts in which datasets are shared: ShareGPT, Alpaca, and two of Stack Exchange questions.

Of Stack Exchange, one holds pairs (``question``, ``response_j`` preferred to ``response_k``), the
other questions with their scored ``answers``. Users' names and ids are dropped; the question's
address is kept, which the licence asks for.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence

from rlhf_ray.data import template
from rlhf_ray.data.reading.counts import BadRow, SkippedRows
from rlhf_ray.data.reading.rows import Row, parse_number, require_text
from rlhf_ray.data.stack_exchange.posts import Answer, Question, html_to_markdown, sample_pairs

# A post in HTML begins with a block element. One in Markdown may show tags later, in its code.
_HTML = re.compile(r"\s*<(p|pre|ul|ol|dl|h\d|hr|blockquote|div|table)\b[^>]*>", re.IGNORECASE)


_CHATS = ("conversations", "conversation")


def in_our_names(row: Row) -> Row:
    """Return a row of ShareGPT's or Alpaca's layout under our names; any other row as it is."""
    chat = next((name for name in _CHATS if name in row), None)
    if chat is not None and "messages" not in row:
        return {"messages" if name == chat else name: value for name, value in row.items()}
    is_alpaca = "instruction" in row and not row.keys() & {"prompt", "question", "messages"}
    return _from_alpaca(row) if is_alpaca and row.keys() & {"output", "chosen"} else row


def _from_alpaca(row: Row) -> Row:
    """Make instruction and input a ``question``; with a system text or a history, a chat."""
    ours = ("instruction", "input", "output", "system", "history")
    named = {name: value for name, value in row.items() if name not in ours}
    if "output" in row:
        named["completion"] = row["output"]
    given = (row["instruction"], row.get("input"))
    question = "\n\n".join(text for text in given if isinstance(text, str) and text)
    history, system = row.get("history") or [], row.get("system")
    if not history and not system:
        return named | {"question": question}
    if not isinstance(history, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in history
    ):
        return named | {"question": None}  # a bad row: empty
    turns = [turn for pair in history for turn in zip(("user", "assistant"), pair, strict=True)]
    chat = [*[("system", system)] * bool(system), *turns, ("user", question)]
    return named | {"prompt": [{"role": role, "content": text} for role, text in chat]}


def convert_stack_exchange(
    row: Row, use: str, max_pairs: int, seed: int
) -> Iterator[Row | SkippedRows]:
    """Convert a row of either layout.

    Args:
        row: a pair, or a question with its answers.
        use: ``prompts`` gives the question, ``preferences`` pairs, any other the answers.
        max_pairs: most pairs drawn from one question's answers.
        seed: of that draw.

    Raises:
        BadRow: the row has no text, or no answer with a score.
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
        yield from _answer_rows(columns, _parse_answers(row["answers"]), use, max_pairs, seed)
    else:
        better = _markdown(require_text(row, "response_j"))
        worse = _markdown(require_text(row, "response_k"))
        pair = {"chosen": better, "rejected": worse}
        yield columns | (pair if use == "preferences" else {"completion": better})


def _answer_rows(
    columns: Row, answers: Sequence[Answer], use: str, max_pairs: int, seed: int
) -> Iterator[Row | SkippedRows]:
    question_id = columns["question_id"]
    number = question_id if isinstance(question_id, int) else 0
    pairs = sample_pairs(Question(number, "", "", (), tuple(answers)), max_pairs, seed)
    if use == "preferences":
        for better, worse in pairs:
            yield {**columns, "chosen": better.body_html, "rejected": worse.body_html}
        if not pairs:
            yield SkippedRows("question_without_pairs", is_bad=False)
        return
    winners = {better.id for better, _ in pairs}
    for answer in answers:
        scored = {"score": answer.score, "preferred": answer.id in winners}
        yield {**columns, "completion": answer.body_html, **scored}


def _parse_answers(value: object) -> list[Answer]:
    """Return the answers with a text and a finite score, their text in Markdown."""
    if not isinstance(value, Sequence) or not value:
        raise BadRow("question_without_answers")
    answers = []
    for number, answer in enumerate(value):
        if not isinstance(answer, Mapping):
            continue
        score, text = parse_number(answer.get("pm_score")), answer.get("text")
        if score is None or not math.isfinite(score):
            continue
        if isinstance(text, str) and text.strip():
            body, accepted = _markdown(text), bool(answer.get("selected"))
            answers.append(Answer(number, body, round(score), accepted))
    if not answers:
        raise BadRow("no_scored_answer", "no answer has both a text and a finite pm_score")
    return answers


def _markdown(text: str) -> str:
    """Return the text in Markdown, whether it is in HTML or already in Markdown."""
    return html_to_markdown(text) if _HTML.match(text) else text.strip()


def _link(metadata: object) -> str | None:
    """Pick the question's address from those of the row (the others are of users and sites)."""
    addresses = map(str, metadata) if isinstance(metadata, (list, tuple)) else ()
    return next((text for text in addresses if re.search(r"/(questions|q)/\d", text)), None)
