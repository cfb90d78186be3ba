"""Chats as data sets hold them: lists of messages, or transcripts in one text."""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from rlhf_ray.data.reading.counts import BadRow

Message = Mapping[str, str]
"""One turn of a chat: ``role`` (system, user, assistant) and ``content``."""

PromptLike = str | Sequence[Message]
"""A prompt as text, or as the turns of a chat up to the answer."""

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(value: object) -> bool:
    """Whether a text is a chat as in HH-RLHF: ``\\n\\nHuman: ...\\n\\nAssistant: ...``."""
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def parse_transcript(text: str) -> list[Message]:
    """The turns of a transcript; an empty one at its end, where the answer would follow, is none.

    Example:
        >>> parse_transcript("\\n\\nHuman: Why?\\n\\nAssistant:")
        [{'role': 'user', 'content': 'Why?'}]
    """
    _, *parts = _TURN.split(text)
    turns: list[Message] = [
        {"role": _ROLES[name], "content": content.strip()}
        for name, content in zip(parts[0::2], parts[1::2], strict=True)
    ]
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    return turns


def parse_messages(value: Any) -> list[Message]:
    """A list of messages, or a transcript, as plain ``role`` and ``content``.

    Raises:
        BadRow: it is neither, or a message has no text.
    """
    if is_transcript(value):
        return parse_transcript(value)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadRow("not_messages", "messages are a list of {role, content}")
    return [_message(item) for item in value]


def is_chat(value: object) -> bool:
    """Whether a cell holds turns and not plain text."""
    return isinstance(value, (list, tuple)) or is_transcript(value)


def parse_prompt(value: Any) -> PromptLike:
    """A prompt's cell: messages where it is a chat, else its text.

    Raises:
        BadRow: the cell holds neither.
    """
    if is_chat(value):
        return parse_messages(value)
    if not isinstance(value, str) or not value.strip():
        raise BadRow("empty")
    return value


def split_last_answer(messages: Sequence[Message]) -> tuple[list[Message], str | None]:
    """The turns before the last answer, and that answer; None where the user has the last word."""
    if messages and messages[-1]["role"] == "assistant":
        return list(messages[:-1]), messages[-1]["content"]
    return list(messages), None


def common_messages(one: Sequence[Message], other: Sequence[Message]) -> list[Message]:
    """The turns with which both begin."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return [message for message, _ in pairs]


def common_text(one: str, other: str) -> str:
    """The words with which both begin, the white space after them included.

    Example:
        >>> common_text("Q: why? A: sum", "Q: why? A: so")
        'Q: why? A: '
    """
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    shared = "".join(character for character, _ in pairs)
    return shared[: len(shared) - len(re.split(r"\s", shared)[-1])]


def _message(item: Any) -> Message:
    role, content = (
        (item.get("role"), item.get("content")) if isinstance(item, Mapping) else (None, None)
    )
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadRow("not_messages", "a message has a role and a content, both text")
    return {"role": role, "content": content}
