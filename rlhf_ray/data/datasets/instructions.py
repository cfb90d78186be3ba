"""Instructions whose following a program can check: the built-in ones, or a file of the user's."""

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_ray.data.datasets.instruction_checks import CHECKS
from rlhf_ray.errors import DataError

BUILT_IN = "builtin"
"""Names `INSTRUCTIONS` where a path may stand."""


@dataclass(frozen=True)
class Instruction:
    """What a model is told, and how the answer is checked."""

    prompt: str
    """What a user says."""
    check: str
    """Name in `instruction_checks.CHECKS`."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the check."""


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
"""The built-in ones, short enough for a small model's window."""


def load_instructions(source: str) -> tuple[Instruction, ...]:
    """The built-in instructions, or those of a JSON Lines file of ``{prompt, check, args}``.

    Raises:
        DataError: the file cannot be read, or a line is no instruction; it is named.
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
    found = tuple(
        _instruction(line, f"evaluate.instructions: {source}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    )
    if not found:
        raise DataError(f"evaluate.instructions: {source} holds no instruction")
    return found


def _instruction(line: str, where: str) -> Instruction:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict) or not str(row.get("prompt") or "").strip():
        raise DataError(f"{where} has no prompt; give {{prompt, check, args}}")
    check, args = str(row.get("check")), row.get("args") or {}
    if check not in CHECKS:
        raise DataError(f"{where}: there is no check {check!r}; it must be {', '.join(CHECKS)}")
    wanted = _arguments(check)
    given = {name: type(value) for name, value in args.items()} if isinstance(args, dict) else args
    if given != wanted:
        told = ", ".join(f"{name} ({kind.__name__})" for name, kind in wanted.items()) or "nothing"
        raise DataError(f"{where}: args of {check} must be {told}, got {json.dumps(args)}")
    return Instruction(row["prompt"], check, args)


def _arguments(check: str) -> dict[str, type]:
    """Name and type of what a check takes besides the text."""
    _, *others = inspect.signature(CHECKS[check]).parameters.values()
    return {other.name: other.annotation for other in others}
