"""Formats of preferences and votes, read from a file."""

from pathlib import Path
from typing import Any, ClassVar

from row_files import Rows, assistant, read, user


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
