import pytest

from rlhf_ray.data.stack_exchange.posts import (
    MAX_DEPTH,
    Answer,
    Question,
    answer_score,
    html_to_markdown,
    sample_pairs,
)


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


def test_a_fence_names_its_language_where_the_post_does() -> None:
    named = '<pre class="lang-js prettyprint-override"><code>let a\n</code></pre>'
    assert html_to_markdown(named).startswith("```js\nlet a")
    assert html_to_markdown("<pre><code>let a\n</code></pre>").startswith("```\nlet a")


def test_a_post_is_nested_too_deeply_whatever_calls_are_around_it() -> None:
    def under(calls: int, html: str) -> str:
        return html_to_markdown(html) if calls == 0 else under(calls - 1, html)

    deepest = "<b>" * MAX_DEPTH + "x" + "</b>" * MAX_DEPTH
    for calls in (0, 400):
        assert "x" in under(calls, deepest)
        assert under(calls, f"<b>{deepest}</b>") == ""
