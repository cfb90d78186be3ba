"""Chats as datasets hold them: lists of messages, also as JSON, or transcripts in one text."""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from rlhf_ray.data.reading.counts import BadRow

Message = Mapping[str, Any]
"""One turn of a chat: ``role`` and ``content``, both text, and what else the row says of it, such
as ``reasoning_content`` or ``tool_calls``."""

PromptLike = str | Sequence[Message]
"""A prompt as text, or as the turns of a chat up to the answer."""

AnswerLike = str | Message
"""An answer as text, or as the assistant's turn where it is more than text."""

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("function", "function_response", "observation"), "tool"),
}
"""Role as other layouts write it -> role as chat templates know it."""

_ANNOTATIONS = {
    *("id", "message_id", "parent_id", "turn_identifier", "timestamp", "created_at", "language"),
    *("lang", "model", "country", "state", "header", "hashed_ip", "toxic", "redacted"),
    *("finish_reason", "stop_reason", "uuid", "date", "source"),
}
"""Keys of a message that are about it, as numbers and truths are; every other key is part of what
was said."""

LEARNT = "learnt"
"""Key of an answer that is not to be learnt; it is False there."""

_WEIGHTS = ("weight", "train", "loss", LEARNT)
"""Keys by which a message says whether it is to be learnt."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of an answer's reasoning; messages use the first, templates any of them."""

_SPOKEN = ("tool_calls", "function_call", *REASONING)
"""Parts of a message besides its text; a number in their place is a mistake."""


def is_transcript(value: object) -> bool:
    """True for a chat written as in HH-RLHF: ``\\n\\nHuman: ...\\n\\nAssistant: ...``."""
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def is_chat(value: object) -> bool:
    """True if a cell holds turns instead of plain text."""
    return isinstance(_decoded(value), list | tuple | Mapping) or is_transcript(value)


def parse_transcript(text: str) -> list[Message]:
    """Split a transcript into messages; an empty answer at its end is left out.

    Example:
        >>> parse_transcript("\\n\\nHuman: Why?\\n\\nAssistant:")
        [{'role': 'user', 'content': 'Why?'}]
    """
    _, *pieces = _TURN.split(text)
    messages: list[Message] = [
        {"role": _ROLES.get(name.lower(), name.lower()), "content": content.strip()}
        for name, content in zip(pieces[0::2], pieces[1::2], strict=True)
    ]
    if messages and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


def parse_messages(value: object) -> list[Message]:
    """Return a list of messages, one message, JSON of either, or a transcript, as messages.

    Raises:
        BadRow: it is none of these, or a message has no text.
    """
    if isinstance(value, str) and is_transcript(value):
        return parse_transcript(value)
    decoded = _decoded(value)
    items = [decoded] if isinstance(decoded, Mapping) else decoded
    if not isinstance(items, Sequence) or isinstance(items, str) or not items:
        raise BadRow("not_messages", "messages must be a list of {role, content}")
    return [_parse_message(item) for item in items]


def _decoded(value: object) -> object:
    """Return the messages in a JSON text, every other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[{", "[ {", "[\n")):
        return value
    try:
        items = json.loads(value)
    except (ValueError, RecursionError):
        return value
    is_message = [isinstance(item, dict) and item.keys() & {"role", "from"} for item in items]
    return items if all(is_message) else value


def _parse_message(item: object) -> Message:
    if not isinstance(item, Mapping):
        raise BadRow("not_messages", "a message must have a role and a content, both text")
    role, content = item.get("role") or item.get("from"), item.get("content", item.get("value"))
    # Arrow files give every message the keys of all others, as None.
    parts = {
        name: value
        for name, value in item.items()
        if name not in ("role", "from", "content", "value", *_ANNOTATIONS)
        and is_said(value)
        and (name in _SPOKEN or not isinstance(value, int | float))
    }
    for name in REASONING[1:]:
        if name in parts:
            parts[REASONING[0]] = parts.pop(name)
    if role == "function_call":
        role, content, parts["function_call"] = "assistant", "", content
    if "function_call" in parts:  # one call or a list, as JSON or not
        calls = _json(parts.pop("function_call"), "tool_calls")
        parts["tool_calls"] = calls if isinstance(calls, list) else [calls]
    if "tool_calls" in parts:
        parts["tool_calls"] = _parse_tool_calls(parts["tool_calls"])
    if content is None and parts.keys() & {"tool_calls", REASONING[0]}:
        content = ""
    text = _parse_content(content)
    if not isinstance(role, str) or text is None:
        raise BadRow("not_messages", "a message must have a role and a content, both text")
    role = _ROLES.get(role.lower(), role.lower())
    if role == "assistant" and any(item.get(name) in (0, False) for name in _WEIGHTS):
        parts[LEARNT] = False
    return {"role": role, "content": text, **parts}


def is_said(value: object) -> bool:
    """False for a value that stands for nothing: null, false, or without items."""
    return value is not None and value is not False and value not in ("", [], {}, ())


def _parse_content(content: object) -> str | None:
    """Return the text of a content, which may be a list of parts; None where it is no content."""
    if not isinstance(content, list | tuple):
        return content if isinstance(content, str) else None
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise BadRow("content_part", f"a content has a part of type {kind}, which is no text")
        texts.append(text)
    return "".join(texts)


def _parse_tool_calls(calls: object) -> list[Message]:
    """Return calls as {type, function: {name, arguments}}, the arguments parsed, as templates
    expect them."""
    parsed = []
    for call in _listed(calls, "tool_calls"):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow("tool_calls", "a tool call must have a function with a name")
        arguments = _without_nulls(_json(function.get("arguments") or {}, "tool_calls"))
        own = {"id": call["id"]} if isinstance(call, Mapping) and call.get("id") else {}
        named = {"name": function["name"], "arguments": arguments}
        parsed.append({**own, "type": "function", "function": named})
    return parsed


def parse_tools(tools: object) -> list[Message]:
    """Return the tools that a chat may call, as {type, function}, from a list or its JSON text.

    Raises:
        BadRow: they are no list of functions with names.
    """
    parsed = []
    for item in _listed(tools, "tools"):
        tool = _json(item, "tools")
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow("tools", "a tool must be a function with a name")
        parsed.append({"type": "function", "function": _without_nulls(function)})
    return parsed


def _without_nulls(value: Any) -> Any:
    """Drop the keys that Arrow files add to a schema or arguments for those of other rows."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(item) for k, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _listed(value: object, column: str) -> Sequence[object]:
    items = _json(value, column) if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise BadRow(column, f"{column} must be a list, or one as JSON")
    return items


def _json(value: object, column: str) -> object:
    """Parse a JSON text; every other value is returned as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise BadRow(column, f"{column} holds a text that is not JSON ({error})") from None


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


def split_last_answer(messages: Sequence[Message]) -> tuple[list[Message], AnswerLike | None]:
    """Split a chat into the messages before its last answer, and that answer.

    The answer is None where the last message is not the assistant's.
    """
    if messages and messages[-1]["role"] == "assistant":
        return list(messages[:-1]), answer_of(messages[-1])
    return list(messages), None


def answer_of(message: Message) -> AnswerLike:
    """Return the text of an assistant's message; the message itself where it is more than text."""
    return message if message.keys() - {"role", "content"} else message["content"]


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
