import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from rlhf_ray.data.stack_exchange.posts import (
    Answer,
    Question,
    answer_score,
    html_to_markdown,
    open_posts,
    read_posts,
    sample_pairs,
)
from rlhf_ray.errors import DataError

QUESTION = '<row Id="{0}" PostTypeId="1" Title="T{0}" Body="&lt;p&gt;B{0}&lt;/p&gt;" {1}/>'
ANSWER = '<row Id="{0}" PostTypeId="2" ParentId="{1}" Score="{2}" Body="&lt;p&gt;A{0}&lt;/p&gt;"/>'


def write(path: Path, *rows: str) -> Path:
    path.write_text("<posts>\n" + "\n".join(rows) + "\n</posts>\n", encoding="utf-8-sig")
    return path


def question_with(scores: list[int]) -> Question:
    answers = tuple(Answer(10 + i, "", score, False) for i, score in enumerate(scores))
    return Question(1, "T", "", (), answers)


@pytest.mark.parametrize(
    ("upvotes", "accepted", "score"),
    [(0, False, 0), (1, False, 1), (2, False, 2), (5, False, 3), (5, True, 4), (-3, False, -1)],
)
def test_score_is_the_published_rule(upvotes: int, accepted: bool, score: int) -> None:
    assert answer_score(upvotes, accepted) == score


def test_a_voted_down_answer_stays_at_minus_one_when_accepted() -> None:
    assert answer_score(-1, True) == -1


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        (
            "<pre><code>if (a &lt; b) {\n  x_1 *= 2;\n}\n</code></pre>",
            "```\nif (a < b) {\n  x_1 *= 2;\n}\n```",
        ),
        ('<p>See <a href="http://a.b/c_d">the page</a>.</p>', "See [the page](http://a.b/c_d)."),
        ("<ul>\n<li>one</li>\n<li>two</li>\n</ul>", "- one\n- two"),
        ("<ol><li>one</li><li>two</li></ol>", "1. one\n2. two"),
        ("<p>a &amp; b &lt; c, 2 * 3, f_x</p>", "a & b < c, 2 * 3, f_x"),
        ("<p>Call <code>f()</code>.</p>\n\n<p>Then stop.</p>", "Call `f()`.\n\nThen stop."),
        ("<p> </p>", ""),
        ("<b>" * 2000 + "x" + "</b>" * 2000, ""),
    ],
)
def test_html_becomes_markdown(html: str, markdown: str) -> None:
    assert html_to_markdown(html) == markdown


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


def test_ten_unique_pairs_of_twelve_scores_with_the_better_first() -> None:
    question = question_with([3, 1, 4, 0, 5, 9, 2, 6, 8, 7, 11, 10])
    pairs = sample_pairs(question, max_pairs=10, seed=0)
    assert len(pairs) == 10
    assert len({frozenset((chosen.id, rejected.id)) for chosen, rejected in pairs}) == 10
    assert all(chosen.score > rejected.score for chosen, rejected in pairs)
    assert pairs == sample_pairs(question, max_pairs=10, seed=0)
    assert pairs != sample_pairs(question, max_pairs=10, seed=1)


def test_ties_make_no_pair() -> None:
    pairs = sample_pairs(question_with([2, 2, 5]), max_pairs=10, seed=0)
    assert sorted((chosen.id, rejected.id) for chosen, rejected in pairs) == [(12, 10), (12, 11)]
    assert sample_pairs(question_with([2, 2, 2]), max_pairs=10, seed=0) == []


def test_memory_does_not_grow_with_the_dump(tmp_path: Path) -> None:
    body = "word " * 400
    question = f'<row Id="{{0}}" PostTypeId="1" Body="{body}"/>'
    answer = f'<row Id="{{1}}" PostTypeId="2" ParentId="{{0}}" Score="1" Body="{body}"/>'
    rows = [(question + answer).format(i, i + 1) for i in range(1, 10_000, 2)]
    path = write(tmp_path / "Posts.xml", *rows)
    assert path.stat().st_size > 20_000_000
    tracemalloc.start()
    num_questions = sum(1 for _ in read_posts(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_questions == 5000
    assert peak < 2_000_000


def test_a_fence_names_its_language_where_the_post_does() -> None:
    named = '<pre class="lang-js prettyprint-override"><code>let a\n</code></pre>'
    assert html_to_markdown(named).startswith("```js\nlet a")
    assert html_to_markdown("<pre><code>let a\n</code></pre>").startswith("```\nlet a")


def test_reading_tells_how_far_it_is(tmp_path: Path) -> None:
    path = tmp_path / "Posts.xml"
    row = '<row Id="{}" PostTypeId="1" Title="q" Body="b"/>'
    path.write_text(f"<posts>{''.join(row.format(i) for i in range(1, 2501))}</posts>")
    reported: list[int] = []
    with open_posts(path, tmp_path, on_read=reported.append) as posts:
        assert posts.num_questions == 2500
        assert len(list(posts.questions())) == 2500
    assert len(reported) == 3
    assert reported == sorted(reported)
    assert reported[-1] == path.stat().st_size
