"""Single answers with a label or a score."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_ray.config.data import DataSource
from rlhf_ray.data.datasets.ratings import load_ratings
from rlhf_ray.data.reading.sources import load_rows
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.data.rendering.tokens import encode
from rlhf_ray.errors import DataError

EOS = 256


def test_labels_and_scores_come_out_as_numbers(tokenizer: PreTrainedTokenizerFast) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "q", "completion": "a", "label": True, "score": 4},
        {"prompt": "q", "completion": "b", "label": "false", "score": "-1.5"},
    ]
    renderer = Renderer(tokenizer)
    labelled, counts = load_ratings(rows, renderer, "label", 32)
    assert list(labelled["target"]) == [1.0, 0.0]
    assert counts == {"kept": 2}
    ids = encode(tokenizer, ["q", "a"])
    assert labelled[0]["token_ids"] == [*ids[0], *ids[1], EOS]
    rated, _ = load_ratings(rows, renderer, "score", 32)
    assert list(rated["target"]) == [4.0, -1.5]


@pytest.mark.parametrize(
    ("target_column", "cell", "why"),
    [
        ("label", 3, "the column label must be true or false, got 3"),
        ("label", None, "the column label must be true or false, got None"),
        ("score", True, "the column score must be a number, got True"),
        ("score", "good", "the column score must be a number, got 'good'"),
        ("score", float("nan"), "the column score must be a number, got nan"),
        ("score", [1], "the column score must be a number"),
    ],
)
def test_what_an_answer_is_worth_must_be_told(
    tokenizer: PreTrainedTokenizerFast, target_column: Any, cell: Any, why: str
) -> None:
    good = {"prompt": "q", "completion": "a", "label": True, "score": 1.0}
    rows = [good, good | {target_column: cell}]
    _, counts = load_ratings(rows, Renderer(tokenizer), target_column, 32, max_bad_share=0.5)
    assert counts == {"kept": 1, f"no_{target_column}": 1}
    with pytest.raises(DataError, match=f"no_{target_column}: {why}".replace("[", r"\[")):
        load_ratings(rows, Renderer(tokenizer), target_column, 32)


def test_overlong_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "opqrstuv", "completion": "abcdefgh", "score": 1}]
    renderer = Renderer(tokenizer)
    with pytest.raises(DataError, match="overlong: 1"):
        load_ratings(rows, renderer, "score", 8)
    with pytest.raises(DataError, match=r"row 0 has 17 tokens, more than model\.max_length 8"):
        load_ratings(rows, renderer, "score", 8, "error")
    cut, _ = load_ratings(rows, renderer, "score", 8, "truncate")
    # Of seven tokens without the end: the prompt's last three, the answer's first four.
    (kept,) = encode(tokenizer, ["tuvabcd"])
    assert cut[0]["token_ids"] == [*kept, EOS]


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"prompt": "q", "completion": "a", "label": False}, {"label": False}),
        ({"prompt": "q", "completion": "a", "score": 2}, {"score": 2}),
    ],
)
def test_disliked_and_rated_answers_are_read(
    tmp_path: Path, row: dict[str, Any], found: dict[str, Any]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (stored,) = load_rows([DataSource(path=str(path))], "ratings")
    assert (stored["prompt"], stored["completion"]) == ("q", "a")
    assert json.loads(stored["_fields"]) == found


def test_answers_of_a_questions_list_are_rated_by_their_scores(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    answers = [{"text": "one", "pm_score": 3}, {"text": "two", "pm_score": 0}]
    path.write_text(json.dumps({"qid": 1, "question": "why?", "answers": answers}) + "\n")
    rows = list(load_rows([DataSource(path=str(path))], "ratings"))
    assert [json.loads(row["_fields"])["score"] for row in rows] == [3, 0]


def test_pairs_are_no_ratings(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}) + "\n")
    with pytest.raises(DataError, match=r"match no format that ratings can use.*completion, label"):
        load_rows([DataSource(path=str(path), format="unpaired")], "ratings")
