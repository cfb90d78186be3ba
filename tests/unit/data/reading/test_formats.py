"""Every format, read from a file, for every use that it has."""

import json
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytest
from row_files import Rows, assistant, read, user

from rlhf_ray.config.data import DataSource
from rlhf_ray.data.reading.counts import RowTally
from rlhf_ray.data.reading.rows import batches, row_prompt
from rlhf_ray.data.reading.sources import load_rows
from rlhf_ray.errors import DataError


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


class TestMessages:
    """Contents of messages, and other forms of chats."""

    def test_content_parts_are_joined(self, tmp_path: Path) -> None:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, "c"]
        picture = [{"type": "image_url", "image_url": {"url": "x"}}]
        rows = [{"messages": [user(content), assistant("d")]} for content in (parts, picture)]
        found, dropped = read(tmp_path, rows, "sft")
        assert found == [{"messages": [user("abc")], "completion": "d"}]
        assert dropped == {"content_part": 1}

    def test_tools_calls_and_reasoning_are_kept(self, tmp_path: Path) -> None:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
        calling = {"role": "assistant", "content": None, "tool_calls": [call]}
        result = {"role": "tool", "tool_call_id": "1", "content": "2"}
        answer = {**assistant("two"), "thinking": "hm", "timestamp": 3, "tool_calls": None}
        chat = [user("a"), calling, result, answer]
        tools = json.dumps([{"name": "f", "parameters": {"type": "object"}}])
        (found,), _ = read(tmp_path, [{"messages": chat, "tools": tools}], "sft")
        parsed = {**call, "function": {"name": "f", "arguments": {"x": 1}}}
        assert found == {
            "messages": [user("a"), {**assistant(""), "tool_calls": [parsed]}, result],
            "completion": {**assistant("two"), "reasoning_content": "hm"},
            "tools": tools,
        }
        (pair,), _ = read(
            tmp_path,
            [{"prompt": [user("a")], "chosen": [calling], "rejected": [assistant("no")]}],
            "preferences",
        )
        assert pair["chosen"]["tool_calls"] == [parsed]

    @pytest.mark.parametrize("calls", ["f(", [{"arguments": {}}], [{"function": None}], 3])
    def test_calls_that_are_none(self, tmp_path: Path, calls: Any) -> None:
        rows = [{"messages": [user("a"), {**assistant("b"), "tool_calls": calls}]}]
        assert read(tmp_path, rows, "sft")[1] == {"tool_calls": 1}

    def test_calls_of_other_layouts(self, tmp_path: Path) -> None:
        call = {"name": "f", "arguments": {"x": 1, "of_another_tool": None}}
        parsed = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
        turns: Rows = [
            {"role": "assistant", "content": None, "function_call": call},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "function_call", "value": json.dumps([call])},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
        found, dropped = read(tmp_path, [{"messages": [user("a"), turn]} for turn in turns], "sft")
        assert dropped == {}
        assert [row["completion"] for row in found] == [
            {**assistant(""), "tool_calls": [parsed]} for _ in turns
        ]

    def test_what_is_noted_of_a_message_is_no_part_of_it(self, tmp_path: Path) -> None:
        noted = {"weight": 1.0, "rank": 0, "train": True, "finish_reason": "stop", "refusal": None}
        chat = [{**user("a"), "weight": 0, "train": False}, {**assistant("b"), **noted}]
        found, dropped = read(tmp_path, [{"messages": chat}], "sft")
        assert (found, dropped) == ([{"messages": [user("a")], "completion": "b"}], {})

    @pytest.mark.parametrize("noted", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
    def test_an_answer_that_is_not_to_be_learnt_is_marked(
        self, tmp_path: Path, noted: dict[str, Any]
    ) -> None:
        marked = {**assistant("b"), "learnt": False}
        chat = [user("a"), {**assistant("b"), **noted}]
        rows: Rows = [{"messages": chat}, {"messages": [*chat, user("c"), assistant("d")]}]
        found, _ = read(tmp_path, rows, "sft")
        assert found == [
            {"messages": [user("a")], "completion": marked},
            {"messages": [user("a"), marked, user("c")], "completion": "d"},
        ]
        assert row_prompt(found[1]) == found[1]["messages"]

    @pytest.mark.parametrize(
        ("row", "use"),
        [
            ({"question": "a", "completion": "b"}, "sft"),
            ({"prompt": "a", "completion": "b"}, "sft"),
            ({"prompt": [user("a")], "completion": "b", "label": True}, "ratings"),
            ({"question": "a"}, "prompts"),
            ({"question": "a", "chosen": "b", "rejected": "c"}, "preferences"),
            ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preferences"),
            (
                {
                    "prompt": "a",
                    "chosen": [user("a"), assistant("b")],
                    "rejected": [user("a"), assistant("c")],
                },
                "preferences",
            ),
        ],
    )
    def test_a_system_text_or_tools_of_their_own_columns_reach_every_layout(
        self, tmp_path: Path, row: dict[str, Any], use: Any
    ) -> None:
        system = {"role": "system", "content": "Be brief."}
        tools = json.dumps([{"name": "f", "parameters": {}}])
        rows = [row | {"system": "Be brief."}, row | {"system": "", "tools": tools}]
        (spoken, armed), dropped = read(tmp_path, rows, use)
        assert spoken["messages"] == [system, user("a")]
        assert armed["messages"] == [user("a")]
        assert dropped == {}
        (bare,), _ = read(tmp_path, [row], use)
        nothing: Rows = [row | {"system": None, "tools": "[]"}, row | {"system": 3}]
        found, _ = read(tmp_path, nothing, use)
        assert [each.get("messages") for each in found] == [bare.get("messages")] * 2

    def test_sharegpt(self, tmp_path: Path) -> None:
        turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
        call = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
        rows: Rows = [
            {"conversations": turns},
            {"conversations": turns, "system": "Be brief.", "id": "x"},
            {"conversations": [turns[0], call, {"from": "observation", "value": "2"}, turns[1]]},
        ]
        worse = {"from": "gpt", "value": "c"}
        pair = {"conversations": turns[:1], "chosen": turns[1], "rejected": worse}
        found, _ = read(tmp_path, rows, "sft")
        assert found[0] == {"messages": [user("a")], "completion": "b"}
        assert found[1]["messages"] == [{"role": "system", "content": "Be brief."}, user("a")]
        roles = [message["role"] for message in found[2]["messages"]]
        assert roles == ["user", "assistant", "tool"]
        assert found[2]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
        assert read(tmp_path, [pair], "preferences")[0] == [
            {"messages": [user("a")], "chosen": "b", "rejected": "c"}
        ]

    def test_alpaca(self, tmp_path: Path) -> None:
        row = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
        rows: Rows = [
            row,
            {**row, "input": ""},
            {**row, "system": "Be brief.", "history": [["Hi", "Hello"]]},
            {**row, "history": "Hi"},
        ]
        found, dropped = read(tmp_path, rows, "sft")
        assert dropped == {"empty": 1}
        question = "Add.\n\n1 + 1"
        prompt = f"Question: {question}\n\nAnswer: "
        assert found[0] == {"prompt": prompt, "question": question, "completion": "2"}
        assert found[1]["question"] == "Add."
        system = {"role": "system", "content": "Be brief."}
        turns = [system, user("Hi"), assistant("Hello"), user(question)]
        assert found[2] == {"messages": turns, "completion": "2"}

    def test_json_texts(self, tmp_path: Path) -> None:
        chat = [user("a"), assistant("b")]
        wanted = [{"messages": [user("a")], "completion": "b"}]
        assert read(tmp_path, [{"messages": json.dumps(chat)}], "sft")[0] == wanted
        pair = {"chosen": json.dumps(chat), "rejected": json.dumps([user("a"), assistant("c")])}
        assert read(tmp_path, [pair], "preferences")[0] == [
            {"messages": [user("a")], "chosen": "b", "rejected": "c"}
        ]
        # Other texts that begin as lists do stay texts.
        rows = [{"prompt": text} for text in ("[{not json", '[{"a": 1}]')]
        assert read(tmp_path, rows, "prompts")[0] == rows


class TestOneOfTwoPrompts:
    """A dataset may bring columns of several formats; one of them holds the prompt."""

    LEFT: ClassVar[Rows] = [user("old"), assistant("stale")]

    def test_a_prompt_comes_before_leftover_messages(self, tmp_path: Path) -> None:
        row = {"prompt": "p", "chosen": "a", "rejected": "b"}
        assert read(tmp_path, [{**row, "messages": self.LEFT}], "preferences")[0] == [row]
        row = {"prompt": "p", "completion": "a"}
        for use in ("sft", "prompts"):
            assert read(tmp_path, [{**row, "messages": self.LEFT}], use)[0] == [row]

    def test_messages_beside_two_answers_are_their_prompt(self, tmp_path: Path) -> None:
        row = {"messages": [user("q"), assistant("a")], "chosen": "a", "rejected": "b"}
        assert read(tmp_path, [row], "preferences")[0] == [
            {"messages": [user("q")], "chosen": "a", "rejected": "b"}
        ]

    def test_a_chat_with_its_first_prompt_is_learnt_as_a_chat(self, tmp_path: Path) -> None:
        row = {"prompt": "a", "messages": [user("a"), assistant("b")]}
        assert read(tmp_path, [row], "sft")[0] == [{"messages": [user("a")], "completion": "b"}]


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
