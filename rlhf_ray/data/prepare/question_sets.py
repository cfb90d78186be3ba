"""The four sets that the stage prepare makes of a dump, and a question's rows in each of them."""

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from itertools import accumulate

import datasets

from rlhf_ray.config import Config
from rlhf_ray.data import template
from rlhf_ray.data.reading.counts import RowTally
from rlhf_ray.data.reading.rows import Row
from rlhf_ray.data.stack_exchange.posts import Answer, Question, html_to_markdown, sample_pairs

_QUESTION = {
    "question_id": datasets.Value("int64"),
    "question": datasets.Value("string"),
    "prompt": datasets.Value("string"),
    "link": datasets.Value("string"),
}
_PAIR = {"chosen": datasets.Value("string"), "rejected": datasets.Value("string")}
_ANSWER = {
    "completion": datasets.Value("string"),
    "score": datasets.Value("int64"),
    "preferred": datasets.Value("bool"),
}
SETS = {
    "finetune": datasets.Features(_QUESTION | _ANSWER),
    "reward": datasets.Features(_QUESTION | _PAIR),
    "rl": datasets.Features(_QUESTION),
    "evaluation": datasets.Features(_QUESTION | _PAIR),
}
"""Columns of each set; a row is an answer, a pair, a question, a pair. ``link`` is the question's
address, which the dumps' licence requires; users are never named."""


@dataclass(frozen=True)
class MarkdownQuestion:
    """A question and its answers in Markdown."""

    question: Question
    """With the answers that have any text."""
    text: str
    answers: dict[int, str]
    """Answer's id -> text."""
    pairs: list[tuple[Answer, Answer]]
    """The better answer first."""
    link: str | None

    def rows(self, name: str) -> list[Row]:
        """Return the question's rows in one of the sets."""
        columns: dict[str, object] = {
            "question_id": self.question.id,
            "question": self.text,
            "prompt": template.prompt(self.text),
            "link": self.link,
        }
        if name == "rl":
            return [columns]
        if name == "finetune":
            winners = {chosen.id for chosen, _ in self.pairs}
            return [
                columns
                | {"completion": self.answers[answer.id], "score": answer.score}
                | {"preferred": answer.id in winners}
                for answer in self.question.answers
            ]
        return [
            columns | {"chosen": self.answers[chosen.id], "rejected": self.answers[rejected.id]}
            for chosen, rejected in self.pairs
        ]


def to_markdown(
    question: Question, config: Config, site: str | None, tally: RowTally, unused: Counter[str]
) -> MarkdownQuestion | None:
    """Convert a question and its answers to Markdown; None where no text is left.

    ``unused`` counts good rows that are not used, by reason.
    """
    text = question.text
    if not text:
        tally.drop_bad("empty_question", 1 + len(question.answers))
        return None
    tally.keep()
    answers = {answer.id: html_to_markdown(answer.body_html) for answer in question.answers}
    kept = tuple(answer for answer in question.answers if answers[answer.id])
    tally.keep(len(kept))
    tally.drop_bad("empty_answer", len(question.answers) - len(kept))
    if not kept:
        unused["question_without_answers"] += 1
        return None
    question = replace(question, answers=kept)
    pairs = sample_pairs(question, config.prepare.max_pairs, config.run.seed)
    distinct = [pair for pair in pairs if answers[pair[0].id] != answers[pair[1].id]]
    if len(distinct) < len(pairs):
        unused["pair_of_equal_texts"] += len(pairs) - len(distinct)
    link = f"https://{site}/questions/{question.id}" if site else None
    return MarkdownQuestion(question, text, answers, distinct, link)


def set_of_question(question_id: int, config: Config) -> str:
    """Choose the set of a question, by its id and the seed alone: the same on every machine."""
    digest = hashlib.sha256(f"split:{config.run.seed}:{question_id}".encode()).digest()
    point = int.from_bytes(digest[:8], "big") / 2**64
    bounds = accumulate(getattr(config.prepare, name) for name in SETS)
    # Floats: the shares may add up to slightly less than 1.
    return next((name for name, bound in zip(SETS, bounds, strict=True) if point < bound), "rl")
