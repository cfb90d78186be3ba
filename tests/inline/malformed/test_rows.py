"""Datasets with broken rows: every bad row is counted, and too many are refused."""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from command_line import Ends

GOOD: Mapping[str, Mapping[str, Any]] = {
    "prompt_completion": {"prompt": "Question: {i}?\n\nAnswer: ", "completion": "It is {i}."},
    "messages": {
        "messages": [
            {"role": "user", "content": "Why {i}?"},
            {"role": "assistant", "content": "So {i}."},
        ]
    },
    "preference": {"prompt": "Question: {i}?\n\nAnswer: ", "chosen": "Yes {i}", "rejected": "No"},
    "answers": {
        "question": "Why {i}?",
        "answers": [{"text": "So {i}", "pm_score": 3}, {"text": "No", "pm_score": 0}],
    },
}
SURROGATE = "a \ud800 b"
USER = {"role": "user", "content": "Why?"}

BAD: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "prompt_completion": {
        "no_prompt": {"completion": "a"},
        "no_completion": {"prompt": "a"},
        "prompt_null": {"prompt": None, "completion": "a"},
        "prompt_number": {"prompt": 3, "completion": "a"},
        "prompt_list": {"prompt": [], "completion": "a"},
        "prompt_list_of_null": {"prompt": [None], "completion": "a"},
        "prompt_mapping": {"prompt": {"a": "b"}, "completion": "a"},
        "prompt_blank": {"prompt": "  ", "completion": "a"},
        "prompt_surrogate": {"prompt": SURROGATE, "completion": "a"},
        "completion_null": {"prompt": "a", "completion": None},
        "completion_blank": {"prompt": "a", "completion": " \n"},
        "completion_number": {"prompt": "a", "completion": 3},
        "completion_nan": {"prompt": "a", "completion": float("nan")},
        "completion_true": {"prompt": "a", "completion": True},
        "completion_list": {"prompt": "a", "completion": []},
        "completion_surrogate": {"prompt": "a", "completion": SURROGATE},
        "empty": {},
        "other_columns": {"x": "a", "y": "b"},
    },
    "messages": {
        "missing": {"x": 1},
        "null": {"messages": None},
        "number": {"messages": 3},
        "text": {"messages": "not messages"},
        "open_json": {"messages": "[{"},
        "mapping": {"messages": {"role": "user"}},
        "empty": {"messages": []},
        "of_null": {"messages": [None, None]},
        "of_text": {"messages": ["Why?", "So."]},
        "no_role": {"messages": [{"content": "a"}, {"content": "b"}]},
        "role_number": {"messages": [{"role": 3, "content": "a"}]},
        "role_unknown": {"messages": [USER, {"role": "oracle", "content": "a"}]},
        "content_null": {"messages": [USER, {"role": "assistant", "content": None}]},
        "content_number": {"messages": [USER, {"role": "assistant", "content": 3}]},
        "content_list_of_numbers": {"messages": [USER, {"role": "assistant", "content": [3]}]},
        "content_image": {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
                {"role": "assistant", "content": "a"},
            ]
        },
        "content_surrogate": {"messages": [USER, {"role": "assistant", "content": SURROGATE}]},
        "user_last": {"messages": [USER]},
        "tool_calls": {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
                },
            ]
        },
    },
    "preference": {
        "no_chosen": {"prompt": "a", "rejected": "b"},
        "no_rejected": {"prompt": "a", "chosen": "b"},
        "chosen_null": {"prompt": "a", "chosen": None, "rejected": "b"},
        "chosen_number": {"prompt": "a", "chosen": 3, "rejected": "b"},
        "chosen_list": {"prompt": "a", "chosen": [], "rejected": "b"},
        "chosen_chat_rejected_text": {"prompt": "a", "chosen": [USER], "rejected": "b"},
        "equal": {"prompt": "a", "chosen": "b", "rejected": "b"},
        "both_blank": {"prompt": "a", "chosen": " ", "rejected": ""},
        "chosen_surrogate": {"prompt": "a", "chosen": SURROGATE, "rejected": "b"},
        "prompt_null": {"prompt": None, "chosen": "x", "rejected": "y"},
    },
    "answers": {
        "null": {"question": "a", "answers": None},
        "text": {"question": "a", "answers": "b"},
        "empty": {"question": "a", "answers": []},
        "of_null": {"question": "a", "answers": [None, {"text": "b", "pm_score": 1}]},
        "of_text": {"question": "a", "answers": ["b", "c"]},
        "no_text": {"question": "a", "answers": [{"pm_score": 1}, {"pm_score": 2}]},
        "score_text": {"question": "a", "answers": [{"text": "b", "pm_score": "many"}]},
        "score_nan": {"question": "a", "answers": [{"text": "b", "pm_score": float("nan")}]},
        "score_infinite": {"question": "a", "answers": [{"text": "b", "pm_score": float("inf")}]},
        "score_null": {"question": "a", "answers": [{"text": "b", "pm_score": None}]},
        "no_question": {"answers": [{"text": "b", "pm_score": 1}]},
        "question_null": {"question": None, "answers": [{"text": "b", "pm_score": 1}]},
    },
}
CASES = [(row_format, name) for row_format, rows in BAD.items() for name in rows]
NUM_GOOD = 24


def good_rows(row_format: str) -> list[Any]:
    text = json.dumps(GOOD[row_format])
    return [json.loads(text.replace("{i}", str(i))) for i in range(NUM_GOOD)]


def write(path: Path, rows: list[Any]) -> Path:
    """JSON Lines; a lone surrogate is written as its escape."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def training(config: Path, run: Path, whole_run: Path, row_format: str, data: Path) -> list[object]:
    """The command that trains on a dataset: a reward model on pairs, a policy on texts."""
    pairs = row_format in ("preference", "answers")
    stage, key = ("reward", "preferences") if pairs else ("sft", "sft")
    base = f"{'sft' if pairs else 'model'}.path={whole_run}/{'sft' if pairs else 'pretrain'}/model"
    chats = ["template.kind=question_answer"] if row_format == "messages" else []
    return [stage, config, f"run.dir={run}", base, f"data.{key}.path={data}", *chats]


@pytest.mark.parametrize(("row_format", "name"), CASES)
def test_a_bad_row_is_counted(
    ends: Ends, config_file: Path, whole_run: Path, tmp_path: Path, row_format: str, name: str
) -> None:
    rows = good_rows(row_format)
    rows.insert(NUM_GOOD // 2, BAD[row_format][name])
    data = write(tmp_path / "rows.jsonl", rows)
    run = tmp_path / "run"
    ends(*training(config_file, run, whole_run, row_format, data), codes=(0,))
    stage = "reward" if row_format in ("preference", "answers") else "sft"
    counts = json.loads((run / stage / "summary.json").read_text(encoding="utf-8"))["rows"]
    parts = counts.values() if stage == "reward" else [counts]
    kept = sum(part["kept"] for part in parts)
    assert kept == NUM_GOOD, "all good rows are learnt, and no other"
    assert sum(sum(part.values()) for part in parts) > kept, f"the bad row is not counted: {counts}"


@pytest.mark.parametrize(("row_format", "name"), CASES)
def test_bad_rows_alone_are_refused(
    ends: Ends, config_file: Path, whole_run: Path, tmp_path: Path, row_format: str, name: str
) -> None:
    data = write(tmp_path / "rows.jsonl", [BAD[row_format][name]] * NUM_GOOD)
    ends(*training(config_file, tmp_path / "run", whole_run, row_format, data))


LINES = "".join(json.dumps(row) + "\n" for row in good_rows("prompt_completion")).encode()
FILES: dict[str, bytes] = {
    "empty.jsonl": b"",
    "blank_lines.jsonl": b"\n\n \n",
    "binary.jsonl": bytes(range(256)),
    "utf16.jsonl": LINES.decode().encode("utf-16"),
    "latin1.jsonl": LINES + '{"prompt": "Zürich", "completion": "a"}'.encode("latin-1"),
    "cut_off.jsonl": LINES[:-9],
    "numbers.jsonl": b"1\n2\n3\n",
    "lists.jsonl": b"[1]\n[2]\n",
    "null.jsonl": b"null\n",
    "text.jsonl": b"just words\n",
    "deep.jsonl": b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}\n",
    "digits.jsonl": b'{"prompt": ' + b"9" * 5000 + b"}\n",
    "open_list.json": b"[" + LINES.replace(b"\n", b",\n"),
    "list_of_numbers.json": b"[1, 2]",
    "number.json": b"3",
    "empty_list.json": b"[]",
    "nested.json": b'{"data": [{"prompt": "a", "completion": "b"}]}',
    "empty.csv": b"",
    "header_alone.csv": b"prompt,completion\n",
    "ragged.csv": b"prompt,completion\na,b,c\nd\n",
    "nul.csv": b"prompt,completion\n\x00,\x00\n",
    "open_quote.csv": b'prompt,completion\n"a,b\n',
    "no_header.csv": b"1,2\n3,4\n",
    "text.parquet": b"just words",
    "magic_alone.parquet": b"PAR1PAR1",
    "cut_off.jsonl.gz": gzip.compress(LINES * 50)[:-40],
    "not_zipped.jsonl.gz": LINES,
    "archive_in_an_archive.jsonl.gz": gzip.compress(gzip.compress(LINES)),
    "rows.xlsx": b"PK\x03\x04",
    "rows": LINES,
    "escape_\x1b[31m.jsonl": b"",
    "own_columns.jsonl": b'{"_bad": 1, "_num": 2, "is_bad": 3}\n' * NUM_GOOD,
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_usable_rows_is_refused(
    ends: Ends, config_file: Path, whole_run: Path, tmp_path: Path, name: str
) -> None:
    data = tmp_path / name
    data.write_bytes(FILES[name])
    ends(*training(config_file, tmp_path / "run", whole_run, "prompt_completion", data))


def test_columns_named_as_our_own_do_not_matter(
    ends: Ends, config_file: Path, whole_run: Path, tmp_path: Path
) -> None:
    rows = [row | {"_bad": i, "_num": 2, "id": None} for i, row in enumerate(good_rows("messages"))]
    data = write(tmp_path / "rows.jsonl", rows)
    ends(*training(config_file, tmp_path / "run", whole_run, "messages", data), codes=(0,))
    summary = json.loads((tmp_path / "run/sft/summary.json").read_text(encoding="utf-8"))
    assert summary["rows"] == {"kept": NUM_GOOD}
