"""Chats as datasets hold them: lists of messages, or transcripts in one text."""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile

from rlhf_ray.data.reading.counts import BadRow

Message = Mapping[str, str]
"""One turn of a chat: ``role`` (system, user, assistant) and ``content``."""

PromptLike = str | Sequence[Message]
"""A prompt as text, or as the turns of a chat up to the answer."""

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(value: object) -> bool:
    """True for a chat written as in HH-RLHF: ``\\n\\nHuman: ...\\n\\nAssistant: ...``."""
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def is_chat(value: object) -> bool:
    """True if a cell holds turns instead of plain text."""
    return isinstance(value, (list, tuple)) or is_transcript(value)


def parse_transcript(text: str) -> list[Message]:
    """Split a transcript into messages; an empty answer at its end is left out.

    Example:
        >>> parse_transcript("\\n\\nHuman: Why?\\n\\nAssistant:")
        [{'role': 'user', 'content': 'Why?'}]
    """
    _, *pieces = _TURN.split(text)
    messages: list[Message] = [
        {"role": _ROLES[name], "content": content.strip()}
        for name, content in zip(pieces[0::2], pieces[1::2], strict=True)
    ]
    if messages and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


def parse_messages(value: object) -> list[Message]:
    """Return a list of messages, or a transcript, as messages with ``role`` and ``content`` alone.

    Raises:
        BadRow: it is neither, or a message has no text.
    """
    if isinstance(value, str) and is_transcript(value):
        return parse_transcript(value)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadRow("not_messages", "messages must be a list of {role, content}")
    return [_parse_message(item) for item in value]


def _parse_message(item: object) -> Message:
    role = item.get("role") if isinstance(item, Mapping) else None
    content = item.get("content") if isinstance(item, Mapping) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadRow("not_messages", "a message must have a role and a content, both text")
    return {"role": role, "content": content}


def parse_prompt(value: object) -> PromptLike:
    """Return a prompt's cell as messages where it is a chat, else as text.

    Raises:
        BadRow: the cell holds neither.
    """
    if is_chat(value):
        return parse_messages(value)
    if not isinstance(value, str) or not value.strip():
        raise BadRow("empty")
    return value


def split_last_answer(messages: Sequence[Message]) -> tuple[list[Message], str | None]:
    """Split a chat into the messages before its last answer, and that answer.

    The answer is None where the last message is not the assistant's.
    """
    if messages and messages[-1]["role"] == "assistant":
        return list(messages[:-1]), messages[-1]["content"]
    return list(messages), None


def common_messages(one: Sequence[Message], other: Sequence[Message]) -> list[Message]:
    """Return the messages with which both chats begin."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return [message for message, _ in pairs]


def common_text(one: str, other: str) -> str:
    """Return the whole words with which both begin, with the white space after them.

    Example:
        >>> common_text("Q: why? A: sum", "Q: why? A: so")
        'Q: why? A: '
    """
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    shared = "".join(character for character, _ in pairs)
    return shared[: len(shared) - len(re.split(r"\s", shared)[-1])]
