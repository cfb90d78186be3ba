"""Posts grouped on disk: from parts of dumps to questions with their answers.

A question's answers are anywhere after it, mostly in other parts. So each part is written to a file
with a batch for each bucket, which a question's id chooses for it and its answers; then a bucket is
read from all files. Parts and buckets depend on the dumps' sizes alone, so that any number of
processes may do any of them in any order; memory is that of one of them.
"""

import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import pyarrow as pa

from rlhf_ray.data.stack_exchange.archives import REMEDY
from rlhf_ray.data.stack_exchange.parts import Part, find_dumps, num_buckets
from rlhf_ray.data.stack_exchange.posts import Answer, Question, answer_score, tag_names
from rlhf_ray.errors import DataError

_INT64 = 2**63

_LEFT_OUT, _QUESTION, _ANSWER = range(3)
"""Kinds of posts; the first is a question that is not selected, whose answers are no orphans."""
_COLUMNS = {
    "dump": pa.int32(),
    "question": pa.int64(),
    "kind": pa.int8(),
    "id": pa.int64(),
    "place": pa.int64(),
    "title": pa.string(),
    "body": pa.string(),
    "tags": pa.string(),
    "accepted": pa.int64(),
    "votes": pa.int64(),
}
_PLACES = 2**40
"""More than a part has rows."""

Post = Mapping[str, str]
"""The attributes of a post's row."""
Stored = Mapping[str, Any]
"""A post as a part's file holds it."""


@dataclass
class Counts:
    """What was read of a part."""

    num_bytes: int = 0
    num_rows: int = 0
    root: str = ""
    """Name of the XML's outermost element."""
    num_questions: int = 0
    num_selected: int = 0
    """Questions that are wanted."""
    num_answers: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Rows left out, by reason."""


def posts_in(path: str, xml: Iterable[bytes], counts: Counts) -> Iterator[Post]:
    """Yield the posts of a part; the parsed tree is emptied so that it does not grow.

    Raises:
        DataError: it is no XML, or cut off.
    """
    parser = ElementTree.XMLPullParser(("start", "end"))
    root = None
    try:
        for chunk in chain(xml, (None,)):
            if chunk is not None:
                parser.feed(chunk)
                counts.num_bytes += len(chunk)
            elif counts.num_bytes:
                parser.close()
            for found in parser.read_events():
                event, element = cast(tuple[str, ElementTree.Element], found)
                if root is None:
                    root, counts.root = element, element.tag
                elif event == "end" and element.tag == "row":
                    counts.num_rows += 1
                    yield element.attrib
                    root.clear()
    except (ElementTree.ParseError, LookupError) as error:  # LookupError: unknown encoding
        if counts.num_rows:
            raise DataError(
                f"{path} is broken or cut off after {counts.num_rows} rows ({error}); unpack it "
                "again"
            ) from None
        raise DataError(f"{path} is not an XML dump ({error}); {REMEDY}") from None


def group(
    part: Part,
    xml: Iterable[bytes],
    into: int,
    is_selected: Callable[[Post], bool],
    file: Path,
) -> Counts:
    """Write the posts of a part to a file, a batch for each bucket; the file appears when whole.

    Args:
        part: which one.
        xml: its XML.
        into: number of buckets of all dumps.
        is_selected: tells of a question's row whether it is wanted.
        file: to write, in Arrow's file format.

    Raises:
        DataError: the XML is broken.
        OSError: the file cannot be written.
    """
    counts = Counts()
    buckets: list[list[tuple[object, ...]]] = [[] for _ in range(into)]
    first = part.number * _PLACES
    for post in posts_in(part.path, xml, counts):
        try:
            values = _values(post, is_selected)
        except (KeyError, ValueError):
            counts.skipped["malformed_row"] += 1
            continue
        if values is not None:
            question, kind, post_id, *others = values
            place = first + counts.num_rows
            row = (part.dump, question, kind, post_id, place, *others)
            counts.num_answers += kind == _ANSWER
            counts.num_questions += kind != _ANSWER
            counts.num_selected += kind == _QUESTION
            buckets[zlib.crc32(f"{part.dump}:{question}".encode()) % into].append(row)
    schema = pa.schema(_COLUMNS)
    partial = file.with_suffix(".tmp")
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, schema, options=options) as w:
        for rows in buckets:
            columns = zip(*rows, strict=True) if rows else ((),) * len(_COLUMNS)
            arrays = map(pa.array, columns, _COLUMNS.values())
            w.write_batch(pa.RecordBatch.from_arrays(list(arrays), schema=schema))
            rows.clear()
    os.replace(partial, file)
    return counts


def _values(post: Post, is_selected: Callable[[Post], bool]) -> tuple[object, ...] | None:
    """Return the columns from ``question`` on, without ``place``; None for another kind of post.

    Raises:
        KeyError: an attribute is missing.
        ValueError: one is no number, or too large for 64 bits.
    """
    kind = post["PostTypeId"]
    if kind == "1":
        post_id, accepted = _int64(post["Id"]), _int64(post.get("AcceptedAnswerId") or 0)
        if not is_selected(post):
            return (post_id, _LEFT_OUT, post_id, "", "", "", 0, 0)
        texts = (post.get("Title", ""), post.get("Body", ""), post.get("Tags", ""))
        return (post_id, _QUESTION, post_id, *texts, accepted, 0)
    if kind == "2":
        post_id, question, votes = (_int64(post[name]) for name in ("Id", "ParentId", "Score"))
        return (question, _ANSWER, post_id, "", post.get("Body", ""), "", 0, votes)
    return None


def _int64(text: str | int) -> int:
    number = int(text)
    if not -_INT64 <= number < _INT64:
        raise ValueError(f"{number} has more than 64 bits")
    return number


def questions_in(
    files: Iterable[Path], bucket: int, skipped: Counter[str], unused: Counter[str]
) -> Iterator[tuple[int, Question]]:
    """Yield the questions of a bucket in the order of dumps and ids, each with its dump's index.

    Of posts with one id, the last one in the dump is taken. Answers are in the order of their ids.

    Args:
        files: those that `group` has written of all parts.
        bucket: its index.
        skipped: filled with the number of posts that are wrong in themselves, by reason.
        unused: filled with the number of questions that are not selected.
    """
    rows: list[Stored] = []
    for file in files:
        with pa.memory_map(str(file)) as source:
            rows += pa.ipc.open_file(source).get_batch(bucket).to_pylist()
    rows.sort(key=lambda row: (row["dump"], row["question"], row["place"]))
    for (dump, _), posts in groupby(rows, key=lambda row: (row["dump"], row["question"])):
        last = {(row["kind"] == _ANSWER, row["id"]): row for row in posts}
        first, *answers = (last[key] for key in sorted(last))
        if first["kind"] == _QUESTION:
            yield dump, _question(first, answers)
        elif first["kind"] == _LEFT_OUT:
            unused["not_selected"] += 1
        else:
            skipped["answer_without_question"] += 1 + len(answers)


def _question(asked: Stored, answers: Sequence[Stored]) -> Question:
    return Question(
        asked["id"],
        asked["title"],
        asked["body"],
        tag_names(asked["tags"]),
        tuple(
            Answer(
                id=answer["id"],
                body_html=answer["body"],
                score=answer_score(answer["votes"], answer["id"] == asked["accepted"]),
                accepted=answer["id"] == asked["accepted"],
            )
            for answer in answers
        ),
    )


def require_questions(paths: Sequence[str], counts: Sequence[Counts]) -> None:
    """Check that dumps hold posts.

    Args:
        paths: the dumps, for messages.
        counts: of their parts, the first part first.

    Raises:
        DataError: they hold no rows, or no questions.
    """
    names = ", ".join(paths)
    if not any(count.num_rows for count in counts):
        root = next((count.root for count in counts if count.root), "")
        raise DataError(f"{names} holds no <row> elements (its root is <{root}>); {REMEDY}")
    if not any(count.num_questions for count in counts):
        num_answers = sum(count.num_answers for count in counts)
        content = f"{num_answers} answers but no questions" if num_answers else "no posts"
        raise DataError(f"{names} holds {content}; {REMEDY}")


def read_posts(
    path: str | Path, work_dir: str | Path | None = None, skipped: Counter[str] | None = None
) -> Iterator[Question]:
    """Yield the questions of a dump with their answers, in the order of ids where it is one part.

    Args:
        path: Posts.xml, plain or packed.
        work_dir: folder for the grouped posts (a third of the XML, removed at the end); None: the
            system's temporary folder.
        skipped: filled with the number of posts left out, by reason.

    Raises:
        DataError: the file is missing, empty, cut off, not XML, or holds no questions.
        OSError: the grouped posts cannot be written.
    """
    skipped = Counter() if skipped is None else skipped
    dumps = find_dumps([str(path)])
    into = num_buckets(dumps)
    with tempfile.TemporaryDirectory(prefix="posts-", dir=work_dir) as folder:
        files, counts = [], []
        for part, xml in dumps[0].pieces():
            files.append(Path(folder) / f"{part.name}.arrow")
            counts.append(group(part, xml, into, lambda _: True, files[-1]))
            skipped.update(counts[-1].skipped)
        require_questions([str(path)], counts)
        for bucket in range(into):
            for _, question in questions_in(files, bucket, skipped, Counter()):
                yield question
