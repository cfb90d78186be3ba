"""Every format, read from a file, for every use that it has."""

import json
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytest

from rlhf_ray.config.data import DataSource
from rlhf_ray.data.reading.counts import RowTally
from rlhf_ray.data.reading.formats import Use
from rlhf_ray.data.reading.rows import batches
from rlhf_ray.data.reading.sources import load_rows
from rlhf_ray.errors import DataError

Rows = list[dict[str, Any]]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def read(folder: Path, rows: Rows, use: Use, form: str = "auto") -> tuple[Rows, dict[str, int]]:
    """What loaders see of these rows, and the counts of those left out."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tally = RowTally("set", 1.0)
    table = load_rows([DataSource.model_validate({"path": str(path), "format": form})], use)
    found = [dict(row) for batch in batches(table, tally) for _, row in batch]
    return found, tally.dropped


def test_text(tmp_path: Path) -> None:
    rows = [{"text": "a", "n": 1}, {"text": " "}, {"text": "b"}]
    assert read(tmp_path, rows, "pretrain") == (
        [{"text": "a", "n": 1}, {"text": "b"}],
        {"empty": 1},
    )


class TestPromptCompletion:
    def test_texts(self, tmp_path: Path) -> None:
        rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}]
        assert read(tmp_path, rows, "sft") == (rows[:1], {"no_answer": 1})
        prompts, _ = read(tmp_path, rows, "prompts")
        assert [row["prompt"] for row in prompts] == ["a", "a"]

    def test_chats(self, tmp_path: Path) -> None:
        before = [user("a"), assistant("b")]
        rows = [
            {"prompt": [user("a")], "completion": [assistant("b")]},
            {"prompt": [user("a")], "completion": [*before[1:], user("c"), assistant("d")]},
            {"prompt": [user("a")], "completion": [user("c")]},
            {"prompt": [{"role": "user"}], "completion": [assistant("b")]},
            {"prompt": "a", "completion": [assistant("b")]},
        ]
        found, dropped = read(tmp_path, rows, "sft")
        assert found == [
            {"messages": [user("a")], "completion": "b"},
            {"messages": [*before, user("c")], "completion": "d"},
            {"prompt": "a", "completion": "b"},
        ]
        assert dropped == {"no_answer": 1, "not_messages": 1}

    def test_a_bare_question_gets_the_plain_layout(self, tmp_path: Path) -> None:
        rows = [{"question": "Why?", "completion": "So."}]
        (found,), _ = read(tmp_path, rows, "sft")
        assert found["prompt"] == "Question: Why?\n\nAnswer: "
        assert found["question"] == "Why?"


def test_messages(tmp_path: Path) -> None:
    chat = [user("a"), assistant("b"), user("c")]
    rows: Rows = [
        {"messages": [*chat, assistant("d")], "source": "web"},
        {"messages": chat},
        {"messages": []},
        {"messages": [assistant("b")]},
    ]
    found, dropped = read(tmp_path, rows, "sft")
    assert found == [{"messages": chat, "completion": "d", "source": "web"}]
    assert dropped == {"no_answer": 1, "no_prompt": 1, "not_messages": 1}
    prompts, _ = read(tmp_path, rows, "prompts")
    assert [row["messages"] for row in prompts] == [chat, chat]


class TestPreference:
    def test_texts(self, tmp_path: Path) -> None:
        rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2}]
        assert read(tmp_path, rows, "preferences")[0] == rows
        assert read(tmp_path, rows, "sft")[0] == [{"prompt": "p", "completion": "a", "margin": 2}]

    def test_the_common_beginning_of_texts_is_their_prompt(self, tmp_path: Path) -> None:
        rows = [
            {"chosen": "Q: why? A: because", "rejected": "Q: why? A: begone"},
            {"chosen": "yes", "rejected": "no"},
        ]
        found, dropped = read(tmp_path, rows, "preferences")
        assert found == [{"prompt": "Q: why? A: ", "chosen": "because", "rejected": "begone"}]
        assert dropped == {"no_prompt": 1}

    def test_chats(self, tmp_path: Path) -> None:
        good, bad = [assistant("yes")], [assistant("no")]
        rows: Rows = [
            {"prompt": [user("a")], "chosen": good, "rejected": bad},
            {"chosen": [user("a"), *good], "rejected": [user("a"), *bad]},
            {"prompt": "a", "chosen": [user("a"), *good], "rejected": [user("a"), *bad]},
        ]
        found, _ = read(tmp_path, rows, "preferences")
        assert found == [{"messages": [user("a")], "chosen": "yes", "rejected": "no"}] * 3

    def test_chats_that_are_no_pair(self, tmp_path: Path) -> None:
        same = [user("a"), assistant("b")]
        longer = [user("a"), assistant("c"), user("d"), assistant("e")]
        rows: Rows = [
            {"chosen": same, "rejected": same},
            {"chosen": same, "rejected": same[:1]},
            {"chosen": same, "rejected": longer},
            {"chosen": [assistant("b")], "rejected": [assistant("c")]},
        ]
        assert read(tmp_path, rows, "preferences") == (
            [],
            {"equal": 1, "no_answer": 1, "no_prompt": 1, "several_turns": 1},
        )

    def test_transcripts(self, tmp_path: Path) -> None:
        start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
        rows = [{"chosen": f"{start} So.\n", "rejected": f"{start} No:\n\n1"}]
        chat = [user("Hi"), assistant("Hello."), user("Why?")]
        assert read(tmp_path, rows, "preferences")[0] == [
            {"messages": chat, "chosen": "So.", "rejected": "No:\n\n1"}
        ]
        assert read(tmp_path, [{"prompt": start}], "prompts")[0] == [{"messages": chat}]
        assert read(tmp_path, rows, "sft")[0] == [{"messages": chat, "completion": "So."}]


class TestUnpaired:
    ROWS: ClassVar[Rows] = [
        {"prompt": "p", "completion": "good", "label": True, "n": 1},
        {"prompt": "q", "completion": "alone", "label": True, "n": 2},
        {"prompt": "p", "completion": "bad", "label": False, "n": 3},
        {"prompt": "p", "completion": "worse", "label": False, "n": 4},
        {"prompt": "p", "completion": "?", "label": None, "n": 5},
    ]

    def test_the_good_ones_are_learnt(self, tmp_path: Path) -> None:
        found, dropped = read(tmp_path, self.ROWS, "sft")
        assert [row["completion"] for row in found] == ["good", "alone"]
        assert dropped == {"label_false": 2, "no_label": 1}

    def test_pairs_of_one_prompt(self, tmp_path: Path) -> None:
        found, dropped = read(tmp_path, self.ROWS, "preferences")
        first = {"prompt": "p", "chosen": "good", "rejected": "bad", "n": 1}
        assert found == [first, first | {"rejected": "worse"}]
        assert dropped == {"no_label": 1, "prompt_without_pair": 1}


class TestStackExchange:
    LINK = "https://x.example/questions/7"
    METADATA = ("https://x.example/users/9/someone", LINK)

    def test_pairs(self, tmp_path: Path) -> None:
        row = {
            "qid": 7,
            "question": "Why?",
            "date": "2020",
            "metadata": self.METADATA,
            "response_j": "So.",
            "response_k": "No.",
        }
        question = {
            "question_id": 7,
            "question": "Why?",
            "prompt": "Question: Why?\n\nAnswer: ",
            "link": self.LINK,
        }
        assert read(tmp_path, [row], "preferences")[0] == [
            {**question, "chosen": "So.", "rejected": "No."}
        ]
        assert read(tmp_path, [row], "sft")[0] == [{**question, "completion": "So."}]
        assert read(tmp_path, [row], "prompts")[0] == [question]

    def test_scored_answers(self, tmp_path: Path) -> None:
        def answer(text: str, score: float | None, name: str) -> dict[str, Any]:
            return {"text": text, "pm_score": score, "selected": False, "author": name}

        answers = [
            answer("<p>So <b>it</b> is.</p>", 3, "Ann"),
            answer("<p>No.</p>", 0, "Bob"),
            answer("<p>Or.</p>", float("nan"), "Cy"),
            answer("", 2, "Di"),
        ]
        question = {"qid": 7, "question": "<p>Why?</p>", "metadata": self.METADATA}
        rows: Rows = [
            {**question, "answers": answers},
            {**question, "answers": []},
            {**question, "answers": answers[2:]},
            {**question, "answers": answers[:1]},
        ]
        pairs, dropped = read(tmp_path, rows, "preferences")
        assert [(row["chosen"], row["rejected"]) for row in pairs] == [("So **it** is.", "No.")]
        assert pairs[0]["link"] == self.LINK
        assert not {"Ann", "Bob"} & {str(value) for value in pairs[0].values()}
        assert dropped == {
            "no_scored_answer": 1,
            "question_without_answers": 1,
            "question_without_pairs": 1,
        }
        texts, _ = read(tmp_path, rows[:1], "sft")
        assert [(row["completion"], row["score"], row["preferred"]) for row in texts] == [
            ("So **it** is.", 3, True),
            ("No.", 0, False),
        ]


def test_markdown_that_shows_tags_is_left_as_it_is(tmp_path: Path) -> None:
    shown = "Use a list:\n\n```html\n<ul>\n  <li>one</li>\n</ul>\n```"
    row = {
        "qid": 1,
        "question": "How?",
        "response_j": shown,
        "response_k": "\n<p>No <b>way</b></p>",
    }
    ((found,), _) = read(tmp_path, [row], "preferences")
    assert (found["chosen"], found["rejected"]) == (shown, "No **way**")


def test_labels_of_a_csv_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,label\na,1,True\nb,2,0\nc,3,1\nd,4,maybe\n")
    tally = RowTally("set", 1.0)
    (batch,) = batches(load_rows([DataSource(path=str(path))], "sft"), tally)
    assert [(row["completion"], row["label"]) for _, row in batch] == [("1", True), ("3", True)]
    assert tally.dropped == {"label_false": 1, "no_label": 1}


def test_verl(tmp_path: Path) -> None:
    row = {
        "data_source": "gsm8k",
        "prompt": [user("1 + 1?")],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"index": 0, "split": "train"},
    }
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_list([row]).to_parquet(str(path))
    table = load_rows([DataSource(path=str(path))], "prompts")
    (batch,) = batches(table, RowTally("set", 0.0))
    ((_, found),) = batch
    rest = {name: value for name, value in row.items() if name != "prompt"}
    assert found == {"messages": [user("1 + 1?")], **rest}
    with pytest.raises(
        DataError, match=r": the columns data_source, .* match no format that preferences can use: "
    ):
        load_rows([DataSource(path=str(path))], "preferences")
