"""Stack Exchange dumps: from Posts.xml to scored questions and answers, and pairs of answers.

A dump holds one ``<row>`` a post in the order of writing, so a question's answers are anywhere
after it. Reading takes two passes: rows are written to a table on disk, which is then read question
by question. Memory does not grow with the dump.
"""

import errno
import itertools
import math
import random
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from xml.etree import ElementTree

from markdownify import MarkdownConverter

from rlhf_ray.errors import DataError

if TYPE_CHECKING:
    from bs4 import Tag

_REMEDY = "give the Posts.xml of a Stack Exchange dump, or the .7z that holds it"

_REPORT_ROWS = 1000
"""Rows between two progress reports."""


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

    A fence names its language where the post does (``<pre class="lang-py ...">``). Elements nested
    hundreds deep, which only broken posts have, give an empty text.
    """
    try:
        markdown = _CONVERTER.convert(html)
    except RecursionError:
        return ""
    return markdown.strip()


def _code_language(pre: "Tag") -> str:
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


@dataclass(frozen=True)
class Posts:
    """A dump that has been read into a table on disk."""

    table: sqlite3.Connection
    num_questions: int

    def questions(self) -> Iterator[Question]:
        """Yield the questions in the order of their ids, each with its answers."""
        yield from _grouped(self.table)


def read_posts(
    path: str | Path, work_dir: str | Path | None = None, skipped: Counter[str] | None = None
) -> Iterator[Question]:
    """Yield the questions of a dump in the order of their ids, each with its answers.

    Arguments and errors are those of `open_posts`.
    """
    with open_posts(path, work_dir, skipped) as posts:
        yield from posts.questions()


@contextmanager
def open_posts(
    path: str | Path,
    work_dir: str | Path | None = None,
    skipped: Counter[str] | None = None,
    on_read: Callable[[int], None] = lambda _: None,
) -> Iterator[Posts]:
    """Read a dump into a table on disk, which yields its questions with their answers.

    Args:
        path: Posts.xml.
        work_dir: folder for the table (about the size of the dump, removed at the end); None: the
            system's temporary folder.
        skipped: filled with the number of rows left out, by reason.
        on_read: called every thousand rows with the number of bytes read so far.

    Raises:
        DataError: the file is missing, empty, cut off, not XML, or holds no questions.
        OSError: the table on disk cannot be written.
    """
    path = Path(path)
    skipped = Counter() if skipped is None else skipped
    with (
        tempfile.TemporaryDirectory(prefix="posts-", dir=work_dir) as folder,
        closing(sqlite3.connect(Path(folder) / "posts.sqlite")) as table,
    ):
        try:
            _fill_table(table, path, skipped, on_read)
        except sqlite3.OperationalError as error:
            raise OSError(errno.EIO, f"{error} (table on disk in {folder})") from error
        num_questions, num_answers = _count_posts(table, skipped)
        if not num_questions:
            content = f"{num_answers} answers but no questions" if num_answers else "no posts"
            raise DataError(f"{path} holds {content}; {_REMEDY}")
        yield Posts(table, num_questions)


def _fill_table(
    table: sqlite3.Connection, path: Path, skipped: Counter[str], on_read: Callable[[int], None]
) -> None:
    table.executescript(
        """
        PRAGMA journal_mode = OFF;
        PRAGMA synchronous = OFF;
        CREATE TABLE questions (id INTEGER PRIMARY KEY, title, body, tags, accepted INTEGER);
        CREATE TABLE answers (id INTEGER PRIMARY KEY, parent INTEGER, body, votes INTEGER);
        """
    )
    for row in _rows(path, on_read):
        try:
            _insert(table, row)
        except (KeyError, ValueError, OverflowError):
            skipped["malformed_row"] += 1
    table.execute("CREATE INDEX by_question ON answers (parent, id)")


def _insert(table: sqlite3.Connection, row: dict[str, str]) -> None:
    kind = row["PostTypeId"]
    if kind == "1":
        texts = (row.get("Title", ""), row.get("Body", ""), row.get("Tags", ""))
        values = (int(row["Id"]), *texts, int(row.get("AcceptedAnswerId") or 0))
        table.execute("INSERT OR REPLACE INTO questions VALUES (?, ?, ?, ?, ?)", values)
    elif kind == "2":
        values = (int(row["Id"]), int(row["ParentId"]), row.get("Body", ""), int(row["Score"]))
        table.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", values)


def _count_posts(table: sqlite3.Connection, skipped: Counter[str]) -> tuple[int, int]:
    (num_questions,) = table.execute("SELECT count(*) FROM questions").fetchone()
    (num_answers,) = table.execute("SELECT count(*) FROM answers").fetchone()
    (num_orphans,) = table.execute(
        "SELECT count(*) FROM answers WHERE parent NOT IN (SELECT id FROM questions)"
    ).fetchone()
    if num_orphans:
        skipped["answer_without_question"] += num_orphans
    return num_questions, num_answers


def _grouped(table: sqlite3.Connection) -> Iterator[Question]:
    questions = table.execute("SELECT id, title, body, tags, accepted FROM questions ORDER BY id")
    for question_id, title, body, tags, accepted_id in questions:
        rows = table.execute(
            "SELECT id, body, votes FROM answers WHERE parent = ? ORDER BY id", (question_id,)
        )
        answers = tuple(
            Answer(
                id=answer_id,
                body_html=answer_body,
                score=answer_score(votes, answer_id == accepted_id),
                accepted=answer_id == accepted_id,
            )
            for answer_id, answer_body, votes in rows
        )
        # Old dumps write <a><b>, new ones |a|b|.
        tag_names = tags.replace("<", "|").replace(">", "|").split("|")
        yield Question(question_id, title, body, tuple(filter(None, tag_names)), answers)


def _rows(path: Path, on_read: Callable[[int], None]) -> Iterator[dict[str, str]]:
    """Yield the attributes of each row; the parsed tree is emptied so that it does not grow."""
    num_rows = 0
    root_tag = ""
    try:
        with _open(path) as file:
            events = ElementTree.iterparse(file, events=("start", "end"))
            _, root = next(events)
            root_tag = root.tag
            for event, element in events:
                if event == "end" and element.tag == "row":
                    num_rows += 1
                    yield dict(element.attrib)
                    root.clear()
                    if num_rows % _REPORT_ROWS == 0:
                        on_read(file.tell())
            on_read(file.tell())
    except (ElementTree.ParseError, LookupError) as error:  # LookupError: unknown encoding
        if num_rows:
            raise DataError(
                f"{path} is broken or cut off after {num_rows} rows ({error}); unpack it again"
            ) from None
        raise DataError(f"{path} is not an XML dump ({error}); {_REMEDY}") from None
    if not num_rows:
        raise DataError(f"{path} holds no <row> elements (its root is <{root_tag}>); {_REMEDY}")


def _open(path: Path) -> BinaryIO:
    if path.is_dir():
        raise DataError(f"{path} is a folder; give the Posts.xml inside it")
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}; {_REMEDY}") from None
    if path.stat().st_size == 0:
        file.close()
        raise DataError(f"{path} is empty (0 bytes); {_REMEDY}")
    return file
