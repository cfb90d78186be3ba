"""The one text layout of a question and its answer, the same bytes in every stage."""


def prompt(question: str) -> str:
    """What a model continues; ends in a space, so the answer starts with its first word.

    Example:
        >>> prompt("How do I sort a list?")
        'Question: How do I sort a list?\\n\\nAnswer: '
    """
    return f"Question: {question}\n\nAnswer: "


def full(question: str, answer: str) -> str:
    """A question with its answer: ``prompt(question) + answer``."""
    return prompt(question) + answer
