"""Checks of instructions, and the file in which users write their own."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.data.datasets.instruction_checks import passes
from rlhf_ray.data.datasets.instructions import (
    BUILT_IN,
    INSTRUCTIONS,
    Instruction,
    load_instructions,
)
from rlhf_ray.errors import DataError


@pytest.mark.parametrize(
    ("check", "args", "good", "bad"),
    [
        (
            "words_begin_with",
            {"letter": "a"},
            ["An apple, always.", "a"],
            ["An old ape", "...", ""],
        ),
        ("words_begin_with", {"letter": "é"}, ["Été"], ["ete"]),
        ("at_most_words", {"num": 3}, ["it's so nice", "one"], ["one two three four", "--", ""]),
        ("at_least_words", {"num": 2}, ["one two"], ["one", ""]),
        ("contains", {"phrase": "water"}, ["Water!", "the water."], ["waters", "wate r"]),
        ("contains", {"phrase": "C++"}, ["I like c++."], ["I like C+."]),
        ("avoids", {"phrase": "the"}, ["Theory then."], ["On THE mat", ""]),
        ("ends_with", {"phrase": "Bye now"}, ["Hello. Bye now\n"], ["Bye now.", "bye now"]),
        ("starts_with", {"phrase": "Dear"}, ["  Dear you"], ["Oh Dear"]),
        ("lower_case", {}, ["all small, 7"], ["Not all", "7"]),
        ("upper_case", {}, ["ALL BIG"], ["Big", "7"]),
        (
            "valid_json",
            {},
            ['{"a": 1}', "[1]", '```json\n{"a": 1}\n```'],
            ["{a: 1}", "1", "[1] so"],
        ),
        ("num_lines", {"num": 2}, ["a\n\nb\n"], ["a", "a\nb\nc"]),
    ],
)
def test_a_check_tells_good_from_bad(
    check: str, args: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    assert [text for text in good if not passes(text, check, args)] == []
    assert [text for text in bad if passes(text, check, args)] == []


def test_the_built_in_ones_are_what_a_file_could_hold(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    rows = [{"prompt": i.prompt, "check": i.check, "args": i.args} for i in INSTRUCTIONS]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert load_instructions(str(file)) == load_instructions(BUILT_IN) == INSTRUCTIONS


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "Be brief.", "check": "at_most_words", "args": {"num": 2}}\n\n')
    assert load_instructions(str(file)) == (Instruction("Be brief.", "at_most_words", {"num": 2}),)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", r"mine\.jsonl, line 2 is not JSON"),
        ('{"check": "lower_case"}', "line 2 has no prompt"),
        (
            '{"prompt": "p", "check": "nice"}',
            "no check 'nice'; it must be one of words_begin",
        ),
        (
            '{"prompt": "p", "check": "contains"}',
            r"args of contains must be phrase \(str\), got {}",
        ),
        (
            '{"prompt": "p", "check": "at_most_words", "args": {"num": "3"}}',
            r"must be num \(int\), got {\"num\": \"3\"}",
        ),
        ('{"prompt": "p", "check": "lower_case", "args": {"x": 1}}', "must be nothing, got"),
    ],
)
def test_a_line_that_is_no_instruction_is_named(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "p", "check": "lower_case"}\n' + line)
    with pytest.raises(DataError, match=says):
        load_instructions(str(file))


def test_a_file_that_is_not_there_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"evaluate\.instructions: .*none\.jsonl cannot be read"):
        load_instructions(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no instruction"):
        load_instructions(str(tmp_path / "empty.jsonl"))
