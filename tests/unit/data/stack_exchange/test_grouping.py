import bz2
import gzip
import lzma
import tracemalloc
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from rlhf_ray.config import data
from rlhf_ray.data.stack_exchange import parts
from rlhf_ray.data.stack_exchange.grouping import read_posts
from rlhf_ray.data.stack_exchange.posts import Answer, Question
from rlhf_ray.errors import DataError

QUESTION = '<row Id="{0}" PostTypeId="1" Title="T{0}" Body="&lt;p&gt;B{0}&lt;/p&gt;" {1}/>'
ANSWER = '<row Id="{0}" PostTypeId="2" ParentId="{1}" Score="{2}" Body="&lt;p&gt;A{0}&lt;/p&gt;"/>'


def write(path: Path, *rows: str) -> Path:
    path.write_text("<posts>\n" + "\n".join(rows) + "\n</posts>\n", encoding="utf-8-sig")
    return path


def test_answers_are_found_anywhere_and_grouped_with_their_question(tmp_path: Path) -> None:
    path = write(
        tmp_path / "Posts.xml",
        ANSWER.format(7, 2, 3),
        QUESTION.format(1, 'AcceptedAnswerId="5" Tags="&lt;py&gt;&lt;c++&gt;"'),
        ANSWER.format(4, 1, 0),
        '<row Id="9" PostTypeId="5" Body="a wiki page"/>',
        QUESTION.format(2, 'Tags="|go|"'),
        ANSWER.format(5, 1, 5),
        QUESTION.format(3, ""),
    )
    first, second, third = read_posts(path, tmp_path)
    assert first == Question(
        1,
        "T1",
        "<p>B1</p>",
        ("py", "c++"),
        (Answer(4, "<p>A4</p>", 0, False), Answer(5, "<p>A5</p>", 4, True)),
    )
    assert (second.tags, [answer.id for answer in second.answers]) == (("go",), [7])
    assert third.answers == ()
    assert first.text == "T1\n\nB1"
    assert [item.name for item in tmp_path.iterdir()] == ["Posts.xml"]


def test_unusable_rows_are_counted_not_fatal(tmp_path: Path) -> None:
    path = write(
        tmp_path / "Posts.xml",
        QUESTION.format(1, ""),
        ANSWER.format(2, 1, 4),
        ANSWER.format(3, 99, 4),
        ANSWER.format(4, 1, "many"),
        '<row PostTypeId="1" Title="no id"/>',
        f'<row Id="{10**30}" PostTypeId="1"/>',
    )
    skipped: Counter[str] = Counter()
    (question,) = read_posts(path, skipped=skipped)
    assert [answer.id for answer in question.answers] == [2]
    assert skipped == {"malformed_row": 3, "answer_without_question": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("", "is empty"),
        ("id,text\n1,hello\n", "is not an XML dump"),
        ("<posts>\n" + QUESTION.format(1, "") + "\n<row Id=", "cut off after 1 rows"),
        ("<rss><item/></rss>", "its root is <rss>"),
        ("<posts></posts>", "holds no <row> elements"),
        ("<posts>" + ANSWER.format(2, 1, 0) + "</posts>", "1 answers but no questions"),
        ('<posts><row Id="1" PostTypeId="5"/></posts>', "holds no posts"),
    ],
)
def test_bad_dumps_are_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "Posts.xml"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        list(read_posts(path))
    assert str(path) in str(caught.value)


def test_a_folder_is_no_dump(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder; give the Posts\.xml inside"):
        list(read_posts(tmp_path))


def test_memory_does_not_grow_with_the_dump(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "PART_BYTES", 400_000)
    body = "word " * 400
    question = f'<row Id="{{0}}" PostTypeId="1" Body="{body}"/>'
    answer = f'<row Id="{{1}}" PostTypeId="2" ParentId="{{0}}" Score="1" Body="{body}"/>'
    rows = [(question + answer).format(i, i + 1) for i in range(1, 8000, 2)]
    path = write(tmp_path / "Posts.xml", *rows)
    assert path.stat().st_size > 16_000_000
    tracemalloc.start()
    num_questions = sum(1 for _ in read_posts(path, tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_questions == 4000
    assert peak < 4_000_000


def site(path: Path, num_questions: int = 60) -> Path:
    """Questions of every length, whose answers come in the other half of the dump."""
    rows = []
    for i in range(1, num_questions):
        rows.append(QUESTION.format(i, f'Tags="|{"ä" * i}|"'))
        rows.append(ANSWER.format(1000 + i, num_questions - i, i))
    return write(path, *rows)


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("part_bytes", [1, 100, 777, 5000, 10**6])
def test_parts_of_any_size_hold_each_post_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    path = site(tmp_path / "Posts.xml")
    expected = list(read_posts(path))
    assert [question.id for question in expected] == list(range(1, 60))
    assert [len(question.answers) for question in expected] == [1] * 59
    paths = [str(path), f"file://{path}"]
    for suffix, pack in PACKED.items():
        packed = tmp_path / f"Posts.xml{suffix}"
        packed.write_bytes(pack(path.read_bytes()))
        paths.append(str(packed))
    monkeypatch.setattr(data, "PART_BYTES", part_bytes)
    monkeypatch.setattr(data, "MOST_PARTS", 10)
    for name in paths:
        assert sorted(read_posts(name), key=lambda question: question.id) == expected, name


@pytest.mark.parametrize(
    "head",
    [
        '<?xml version="1.0" encoding="latin-1"?><posts>',
        '<!DOCTYPE posts [<!ENTITY e "E">]><posts>',
        "<dump>",
    ],
)
def test_a_dump_whose_rows_need_what_is_before_them_is_one_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    text = site(tmp_path / "Posts.xml").read_text(encoding="utf-8-sig").replace("ä", "e")
    text = text.replace("<posts>", head).replace("</posts>", f"</{head.rpartition('<')[2]}")
    (tmp_path / "Posts.xml").write_text(text)
    monkeypatch.setattr(data, "PART_BYTES", 500)
    assert len(list(read_posts(tmp_path / "Posts.xml"))) == 59
    (dump,) = parts.find_dumps([str(tmp_path / "Posts.xml")])
    assert [part.stop for part in dump.parts()] == [None]


def test_a_post_that_comes_twice_is_its_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "PART_BYTES", 120)
    rows = [QUESTION.format(1, 'Tags="old"'), ANSWER.format(2, 1, 0), ANSWER.format(2, 1, 7)]
    (question,) = read_posts(write(tmp_path / "Posts.xml", *rows, QUESTION.format(1, 'Tags="new"')))
    assert question.tags == ("new",)
    assert question.answers == (Answer(2, "<p>A2</p>", 3, False),)
