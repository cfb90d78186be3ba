"""A small synthetic Stack Exchange site with a known measure of quality.

Each question asks how to do one thing to another in a programming language. Answers differ in
relevance, code, courtesy and length; votes follow that quality with noise. So a reward model can
learn quality from votes alone, and `gold_score` shows whether it did. Sentences use few words, so
that a model of some 100,000 parameters learns to write them in minutes.
"""

import itertools
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

VERBS = (
    *("sort", "copy", "read", "print", "count", "merge"),
    *("split", "find", "load", "save", "clear", "join"),
)
OBJECTS = (
    *("list", "file", "text", "map", "set", "table"),
    *("tree", "queue", "graph", "row", "line", "page"),
)
LANGUAGES = ("Python", "Java", "Rust", "Go", "Ruby", "Perl")

# No sentence below may contain a word of VERBS or OBJECTS: those decide relevance.
_QUESTION_BODIES = (
    "I am new to this.",
    "It has to be fast.",
    "I need this at work.",
    "It is for big input.",
    "I need one safe call.",
    "I can use no other tool.",
    "What is the right way?",
    "I need the result each day.",
)
_ADVICE = (
    "Use the {verb} call on the {object} in {language}.",
    "You can {verb} the {object} in one call.",
    "In {language} you {verb} a {object} like this.",
    "To {verb} a {object} you need one call.",
)
_REMARKS = (
    "It works for me and it is fast.",
    "Then check that the result is right.",
    "I use this at work each day.",
    "It is safe for big input too.",
    "You need no other tool for it.",
)
_COURTEOUS = ("I hope this helps you.", "Thank you for asking.", "Good luck with it.")
_RUDE = ("What a lazy question.", "Only a fool would ask this.", "You should just know this.")
_COURTEOUS_MARKS = ("hope this helps", "thank you", "good luck")
_RUDE_MARKS = ("lazy", "fool", "should just know")

_TITLE = re.compile(r"how do i (\w+) a (\w+) in (\w+)", re.IGNORECASE)
_FENCED = re.compile(r"^```[^`\n]*\n([^`]*\w[^`]*)\n```[ \t]*$", re.MULTILINE)
GOOD_LENGTH = range(15, 29)
"""Number of words, code left out, of an answer that is neither curt nor rambling."""

_BLOCK = 50
"""Questions written before their answers, so that questions and answers mix as in a real dump."""


@dataclass(frozen=True)
class _Topic:
    verb: str
    object: str
    language: str

    @property
    def title(self) -> str:
        return f"How do I {self.verb} a {self.object} in {self.language}?"


@dataclass(frozen=True)
class _Post:
    """An answer: a paragraph, a line of code, another paragraph; the last two may be empty."""

    advice: str
    code: str
    remarks: str

    @property
    def markdown(self) -> str:
        """The post in Markdown."""
        code = f"```\n{self.code}\n```" if self.code else ""
        return "\n\n".join(part for part in (self.advice, code, self.remarks) if part)

    @property
    def html(self) -> str:
        code = f"<pre><code>{escape(self.code)}\n</code></pre>" if self.code else ""
        parts = (_paragraph(self.advice), code, _paragraph(self.remarks))
        return "\n\n".join(part for part in parts if part) + "\n"


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>" if text else ""


def gold_score(question: str, answer: str) -> float:
    """Return the hidden quality of an answer, in [0, 1].

    .4 relevant (names the question's verb and object and no other) + .25 has at least one closed
    code fence with something in it + .2 courteous (a kind phrase and no rude one) + .15 has a
    number of words in `GOOD_LENGTH`, code left out.

    Args:
        question: the question's text, or a prompt that contains it, in Markdown.
        answer: any text, in Markdown.
    """
    lowered = answer.lower()
    num_words = len(re.findall(r"\w+", _FENCED.sub("", answer)))
    return (
        0.4 * _relevant(question, lowered)
        + 0.25 * (_FENCED.search(answer) is not None)
        + 0.2 * (courtesy(answer) > 0)
        + 0.15 * (num_words in GOOD_LENGTH)
    )


def courtesy(answer: str) -> int:
    """Return 1 of an answer with a kind phrase, -1 of one with a rude one, else 0."""
    lowered = answer.lower()
    if any(mark in lowered for mark in _RUDE_MARKS):
        return -1
    return int(any(mark in lowered for mark in _COURTEOUS_MARKS))


def _relevant(question: str, lowered_answer: str) -> bool:
    title = _TITLE.search(question)
    if title is None:
        return False
    words = set(re.findall(r"\w+", lowered_answer))
    verb, thing = title[1].lower(), title[2].lower()
    return words.intersection(VERBS) == {verb} and words.intersection(OBJECTS) == {thing}


def write_posts(path: str | Path, num_questions: int, seed: int) -> None:
    """Write a site as Posts.xml. The same arguments give the same bytes.

    Some questions have fewer than two answers, most have an accepted one, and bad answers have
    votes below zero. Up to 6912 questions differ from each other.
    """
    rng = random.Random(f"site:{seed}")
    topics = _topics(rng, num_questions)
    ids = itertools.count(1)
    # Real dumps start with a byte-order mark, so this one does too.
    with Path(path).open("w", encoding="utf-8-sig", newline="\n") as file:
        file.write('<?xml version="1.0" encoding="utf-8"?>\n<posts>\n')
        while block := list(itertools.islice(topics, _BLOCK)):
            file.writelines(_block_rows(rng, block, ids))
        file.write("</posts>\n")


def _topics(rng: random.Random, num_questions: int) -> Iterator[tuple[_Topic, str]]:
    """Yield topic and body of each question; none is repeated before all have been used."""
    every = list(itertools.product(VERBS, OBJECTS, LANGUAGES, _QUESTION_BODIES))
    rng.shuffle(every)
    for verb, thing, language, body in itertools.islice(itertools.cycle(every), num_questions):
        yield _Topic(verb, thing, language), body


def _block_rows(
    rng: random.Random, block: list[tuple[_Topic, str]], ids: Iterator[int]
) -> Iterator[str]:
    """Yield the rows of some questions, then of their answers in random order."""
    topics = {next(ids): topic for topic, _ in block}
    bodies = (body for _, body in block)
    parents = [
        question_id
        for question_id in topics
        for _ in range(rng.choices(range(8), weights=(2, 6, 10, 18, 24, 20, 12, 8))[0])
    ]
    rng.shuffle(parents)
    rows: list[str] = []
    utilities: dict[int, dict[int, float]] = {question_id: {} for question_id in topics}
    for parent in parents:
        post = _answer(rng, topics[parent])
        answer_id = next(ids)
        utility = utilities[parent][answer_id] = _utility(topics[parent].title, post)
        votes = _votes(rng, utility)
        rows.append(_row(answer_id, 2, votes, post.html, ParentId=parent))
    for (question_id, topic), body in zip(topics.items(), bodies, strict=True):
        yield _row(
            question_id,
            1,
            rng.randrange(12),
            _paragraph(body) + "\n",
            AcceptedAnswerId=_accepted(rng, utilities[question_id]),
            Title=topic.title,
            Tags=f"<{topic.language.lower()}>",
            AnswerCount=len(utilities[question_id]),
        )
    yield from rows


def _answer(rng: random.Random, topic: _Topic) -> _Post:
    if rng.random() >= 0.6:
        topic = _Topic(
            rng.choice([verb for verb in VERBS if verb != topic.verb]),
            rng.choice([thing for thing in OBJECTS if thing != topic.object]),
            topic.language,
        )
    advice: list[str] = [rng.choice(_ADVICE).format_map(vars(topic))]
    remarks: list[str] = rng.sample(_REMARKS, rng.choices(range(4), weights=(30, 25, 25, 20))[0])
    tone = rng.random()
    if tone < 0.35:
        advice.insert(0, rng.choice(_RUDE))
    elif tone < 0.7:
        remarks.append(rng.choice(_COURTEOUS))
    code = f"run {topic.verb} {topic.object}" if rng.random() < 0.5 else ""
    if not code:
        return _Post(" ".join(advice + remarks), "", "")
    return _Post(" ".join(advice), code, " ".join(remarks))


def _utility(question: str, post: _Post) -> float:
    """Return an answer's quality in the eyes of voters, in units of the votes' exponent.

    It is the gold score with relevance at half its weight: a model of two layers cannot compare an
    answer with its question, and at full weight that would drown what it can learn. At this scale
    the better answer wins about 78% of the pairs.
    """
    seen = gold_score(question, post.markdown) - 0.2 * _relevant(question, post.markdown.lower())
    return 4.5 * (seen - 0.15)


def _votes(rng: random.Random, utility: float) -> int:
    """Draw votes: exp(.9 utility + N(0, 1)), downvotes where the exponent is far below zero."""
    exponent = 0.9 * utility + rng.gauss(0, 1)
    return round(exponent) if exponent < -1 else round(math.exp(exponent))


def _accepted(rng: random.Random, utilities: dict[int, float]) -> int | None:
    """Return the id of the accepted answer, mostly the best; a quarter of askers accept none."""
    if not utilities or rng.random() < 0.25:
        return None
    return max(utilities, key=lambda answer_id: utilities[answer_id] + rng.gauss(0, 1))


def _row(post_id: int, kind: int, score: int, body: str, **more: str | int | None) -> str:
    written = datetime(2020, 1, 1, tzinfo=UTC) + timedelta(minutes=7 * post_id)
    attributes = {
        "Id": post_id,
        "PostTypeId": kind,
        "CreationDate": written.strftime("%Y-%m-%dT%H:%M:%S.000"),
        "Score": score,
        "Body": body,
        **more,
    }
    pairs = (f"{key}={quoteattr(str(v))}" for key, v in attributes.items() if v is not None)
    return f"  <row {' '.join(pairs)} />\n"
