"""Instructions with a check that a program can run: the built-in ones, or a user's file."""

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_ray.data.datasets.instruction_checks import CHECKS
from rlhf_ray.errors import DataError

BUILT_IN = "builtin"
"""Value of ``evaluate.instructions`` that selects `INSTRUCTIONS` instead of a file."""


@dataclass(frozen=True)
class Instruction:
    """A prompt and the check of its answer."""

    prompt: str
    """The user's message."""
    check: str
    """Name of a check in `instruction_checks.CHECKS`."""
    args: Mapping[str, object] = field(default_factory=dict)
    """Arguments of the check besides the text."""


INSTRUCTIONS = (
    Instruction(
        "Write one sentence. Every word begins with a.", "words_begin_with", {"letter": "a"}
    ),
    Instruction("Name animals. Every word begins with c.", "words_begin_with", {"letter": "c"}),
    Instruction("What is rain? Use at most ten words.", "at_most_words", {"num": 10}),
    Instruction("Name a colour in one word.", "at_most_words", {"num": 1}),
    Instruction("What is bread? Use at least 20 words.", "at_least_words", {"num": 20}),
    Instruction("Describe a beach. Use the word water.", "contains", {"phrase": "water"}),
    Instruction("Describe a cat. Never say the word the.", "avoids", {"phrase": "the"}),
    Instruction("Say hello. End with the words: Bye now", "ends_with", {"phrase": "Bye now"}),
    Instruction("Greet me. Begin with the word: Dear", "starts_with", {"phrase": "Dear"}),
    Instruction("What is snow? Use small letters only.", "lower_case"),
    Instruction("What is fire? Use capital letters only.", "upper_case"),
    Instruction("Give a name and an age as JSON, nothing else.", "valid_json"),
    Instruction("Name three fruits, one on each line.", "num_lines", {"num": 3}),
)
"""The built-in instructions, short enough for a small model's context window."""


def load_instructions(source: str) -> tuple[Instruction, ...]:
    """Return the built-in instructions, or those of a JSON Lines file of ``{prompt, check, args}``.

    Raises:
        DataError: the file cannot be read, or a line (named by its number) is no instruction.
    """
    if source == BUILT_IN:
        return INSTRUCTIONS
    try:
        lines = Path(source).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"evaluate.instructions: {source} cannot be read ({error}); give {BUILT_IN} or a JSON "
            "Lines file of {prompt, check, args}"
        ) from error
    instructions = tuple(
        _instruction(line, f"evaluate.instructions: {source}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    )
    if not instructions:
        raise DataError(
            f"evaluate.instructions: {source} holds no instruction; give at least one line of "
            "{prompt, check, args}"
        )
    return instructions


def _instruction(line: str, where: str) -> Instruction:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict) or not str(row.get("prompt") or "").strip():
        raise DataError(f"{where} has no prompt; each line must be {{prompt, check, args}}")
    check, args = str(row.get("check")), row.get("args") or {}
    if check not in CHECKS:
        raise DataError(
            f"{where}: there is no check {check!r}; it must be one of {', '.join(CHECKS)}"
        )
    expected = _argument_types(check)
    if not isinstance(args, dict) or {key: type(value) for key, value in args.items()} != expected:
        listed = ", ".join(f"{key} ({kind.__name__})" for key, kind in expected.items())
        raise DataError(
            f"{where}: args of {check} must be {listed or 'nothing'}, got {json.dumps(args)}"
        )
    return Instruction(row["prompt"], check, args)


def _argument_types(check: str) -> dict[str, type]:
    """Return the names and types of a check's parameters besides the text."""
    _, *parameters = inspect.signature(CHECKS[check]).parameters.values()
    return {parameter.name: parameter.annotation for parameter in parameters}
