"""The plain question-and-answer layout, the same bytes in every stage."""

from collections.abc import Mapping, Sequence

ROLES = ("system", "developer", "user", "assistant")
"""Roles of a chat that the layout has a place for."""


def prompt(question: str) -> str:
    """Return what a model continues; it ends in a space, so the answer starts with its first word.

    Example:
        >>> prompt("How do I sort a list?")
        'Question: How do I sort a list?\\n\\nAnswer: '
    """
    return f"Question: {question}\n\nAnswer: "


def full(question: str, answer: str) -> str:
    """Return a question with its answer: ``prompt(question) + answer``."""
    return prompt(question) + answer


def chat(messages: Sequence[Mapping[str, str]], end: str) -> str:
    """Return a chat in this layout, with ``end`` after answers and a blank line after other roles.

    Example:
        >>> chat([{"role": "user", "content": "Why?"}, {"role": "system", "content": "Say!"}], "")
        'Question: Why?\\n\\nAnswer: Say!\\n\\n'
    """
    layouts = {"user": prompt, "assistant": lambda answer: answer + end}
    return "".join(
        layouts.get(message["role"], lambda text: f"{text}\n\n")(message["content"])
        for message in messages
    )
