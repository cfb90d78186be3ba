import hashlib
from pathlib import Path

import pytest

from rlhf_ray.data.stack_exchange.grouping import read_posts
from rlhf_ray.data.stack_exchange.posts import Question, html_to_markdown
from rlhf_ray.data.stack_exchange.synthetic_site import (
    _ADVICE,
    _COURTEOUS,
    _QUESTION_BODIES,
    _REMARKS,
    _RUDE,
    OBJECTS,
    VERBS,
    gold_score,
    write_posts,
)

ASKED = "How do I sort a list in Python?\n\nI am new to this."
ON_TOPIC = "You can sort the list in one call."
CODE = "```\nrun sort list\n```"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    path = tmp_path_factory.mktemp("site") / "Posts.xml"
    write_posts(path, 400, seed=0)
    return list(read_posts(path))


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("", 0.0),
        (ON_TOPIC, 0.4),
        ("You can sort the map in one call.", 0.0),
        ("You can sort the list and the map in one call.", 0.0),
        (f"Try this.\n\n{CODE}", 0.4 + 0.25),
        (f"{CODE}\n\n{CODE}\n\n{CODE}", 0.4 + 0.25),
        ("Thank you for asking.", 0.2),
        ("What a lazy question. Thank you for asking.", 0.0),
        (" ".join(["word"] * 15), 0.15),
        (" ".join(["word"] * 14), 0.0),
        (" ".join(["word"] * 31), 0.0),
        (" ".join(["```"] * 20), 0.0),
        (f"{CODE}\n\n" * 20, 0.4 + 0.25),
        (f"{ON_TOPIC}\n\n{CODE}\n\nIt is fast. I hope this helps you.", 1.0),
    ],
)
def test_gold_score_adds_up(answer: str, score: float) -> None:
    assert gold_score(ASKED, answer) == pytest.approx(score)


@pytest.mark.parametrize(
    "answer",
    ["```", "``` ``` ```", "```\n```\n```\n```", "```\nrun", "```\n  \n```", "```\n\n```\n"],
)
def test_fences_without_a_closed_block_of_code_earn_nothing(answer: str) -> None:
    assert gold_score(ASKED, answer) == 0.0


def test_gold_score_takes_a_whole_prompt_and_knows_no_other_questions() -> None:
    assert gold_score(f"Question: {ASKED}\n\nAnswer: ", ON_TOPIC) == pytest.approx(0.4)
    assert gold_score("What is coffee?", ON_TOPIC) == 0.0


def test_no_fixed_sentence_decides_relevance() -> None:
    fixed = " ".join(_ADVICE + _REMARKS + _COURTEOUS + _RUDE + _QUESTION_BODIES).lower()
    words = set(fixed.replace(".", " ").replace("?", " ").split())
    assert not words.intersection(VERBS + OBJECTS)


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_posts(tmp_path / name, 120, seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b
    assert a != c
    # In another process, on another machine too.
    assert (
        hashlib.sha256(a).hexdigest()
        == "bdd1f8f931d3d321d585a85e1c29d2d8739e6c9d1cfcfe196a01de92e60762a1"
    )


def test_questions_differ_and_some_lack_answers(site: list[Question]) -> None:
    assert len({question.text for question in site}) == len(site) == 400
    num_answers = [len(question.answers) for question in site]
    assert 3.5 < sum(num_answers) / 400 < 4.5
    assert any(num < 2 for num in num_answers)
    assert all(sum(answer.accepted for answer in question.answers) <= 1 for question in site)


def test_base_rates_leave_room_to_improve(site: list[Question]) -> None:
    texts = [(q.text, html_to_markdown(a.body_html)) for q in site for a in q.answers]
    share = 1 / len(texts)
    assert 0.45 < share * sum(text.count("```") == 2 for _, text in texts) < 0.55
    assert 0.3 < share * sum(any(rude in text for rude in _RUDE) for _, text in texts) < 0.4
    assert 0.3 < share * sum(any(kind in text for kind in _COURTEOUS) for _, text in texts) < 0.4
    assert 0.45 < share * sum(gold_score(*both) for both in texts) < 0.6
    assert all(7 <= len(text.split()) <= 45 for _, text in texts)


def test_votes_follow_gold_with_noise(site: list[Question]) -> None:
    rated = [
        (gold_score(q.text, html_to_markdown(a.body_html)), a.score)
        for q in site
        for a in q.answers
    ]
    good = [score for gold, score in rated if gold >= 0.7]
    poor = [score for gold, score in rated if gold <= 0.3]
    assert sum(good) / len(good) > sum(poor) / len(poor) + 1
    assert min(good) < max(poor)
    assert any(score == -1 for score in poor)
