"""Checks that a rendering shows all parts of a chat: templates drop parts that they do not know."""

import json
from collections.abc import Iterator, Mapping, Sequence

from rlhf_ray.data.reading.chats import LEARNT, REASONING, Message
from rlhf_ray.data.reading.counts import BadRow
from rlhf_ray.data.rendering.chat_template import PROBE

_UNSAID = ("role", "tool_call_id", "id", "type", LEARNT)
"""Keys that say how parts belong together, which templates show by their order, or what is learnt.
"""

_MARKED = ("content", REASONING[0])
_REASONS = {"user": "template_drops_prompt", "assistant": "template_drops_answer"}

_REMEDY = "leave it out of the rows (data.<use>.function), or change the template"


def require_shown(chat: Sequence[Message], tools: Sequence[Message], text: str) -> None:
    """Check that a rendering shows all of a chat; white space is not compared.

    Args:
        chat: what was rendered.
        tools: that the chat may call.
        text: the rendering.

    Raises:
        BadRow: a part is missing; the reason and the explanation name it.
    """
    shown = squeezed(text)
    for number, message in enumerate(chat):
        for name, value in message.items():
            if not all(_is_shown(leaf, shown) for leaf in _said(name, value)):
                raise _dropped(name, message["role"], f"of message {number} ({message['role']})")
    if not all(_is_shown(leaf, shown) for tool in tools for leaf in _names(tool["function"])):
        raise BadRow("template_drops_tools", "the chat template does not show the row's tools")


def untold(tools: Sequence[Message], chat: Sequence[Message]) -> list[Message]:
    """Return the tools that no text of the chat describes; some datasets' system texts do."""
    texts = squeezed("".join(message["content"] for message in chat)) if tools else ""

    def is_told(leaf: str) -> bool:
        forms = (repr(leaf), json.dumps(leaf), json.dumps(leaf, ensure_ascii=False))
        return any(squeezed(form) in texts for form in forms)

    return [tool for tool in tools if not all(map(is_told, _names(tool["function"])))]


def with_markers(chat: Sequence[Message]) -> list[Message]:
    """Return the chat with a word of its own for the text and for the reasoning of each message."""
    return [
        {
            name: f"{PROBE}{number}{name}" if name in _MARKED and value else value
            for name, value in message.items()
        }
        for number, message in enumerate(chat)
    ]


def _dropped(name: str, role: str, where: str) -> BadRow:
    if name == "content":
        reason = _REASONS.get(role, f"template_drops_{role}")
        lost = f"the chat template drops the {role}'s text, or a part of it"
        return BadRow(reason, f"{lost}; {_REMEDY}")
    lost = f"the chat template does not show {name} {where}"
    return BadRow(f"template_drops_{name}", f"{lost}; {_REMEDY}")


def squeezed(text: str) -> str:
    """Return the text without white space, which templates trim and add."""
    return "".join(text.split())


def _is_shown(leaf: object, shown: str) -> bool:
    if not isinstance(leaf, str):
        return any(squeezed(form) in shown for form in (str(leaf), json.dumps(leaf)))
    if squeezed(leaf) in shown:
        return True
    forms = (json.dumps(leaf)[1:-1], json.dumps(leaf, ensure_ascii=False)[1:-1])
    return any(squeezed(form) in shown for form in forms)


def _said(name: str, value: object) -> Iterator[object]:
    """Yield the texts and numbers in a part of a message, and the names in it."""
    if name in _UNSAID:
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _said(key, item)
            if name == "arguments":
                yield key
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _said("", item)
    else:
        yield value


def _names(schema: object) -> Iterator[str]:
    """Yield names and descriptions in a tool's schema; templates write its types as they like."""
    if isinstance(schema, Mapping):
        said = (schema.get("name"), schema.get("description"))
        yield from (text for text in said if isinstance(text, str))
        properties = schema.get("properties")
        yield from properties if isinstance(properties, Mapping) else ()
        for item in schema.values():
            yield from _names(item)
    elif isinstance(schema, list | tuple):
        for item in schema:
            yield from _names(item)
