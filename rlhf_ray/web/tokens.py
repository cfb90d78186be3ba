"""A response's tokens, coloured by a number of each."""

import math
from typing import Any

KINDS = {
    "advantage": "Advantage: what the policy was moved by; blue more of it, orange less",
    "kl": "KL: log-prob above (blue) or below (orange) the reference's, nats",
    "mismatch": "Mismatch: the engine's log-prob above (blue) or below (orange) the learner's",
}
"""Numbers of a token, and what their colours mean."""
MOST = 8
"""Tokens that are listed besides: those with the largest numbers."""


def coloured(tokens: object, kind: str) -> dict[str, Any] | None:
    """Return tokens with a share from -1 to 1 of the largest size; None where none are recorded.

    Damaged columns are missing ones.
    """
    if not isinstance(tokens, dict):
        return None
    texts, ids = _column(tokens, "texts"), _column(tokens, "ids")
    columns = {name: _numbers(tokens, name, len(texts)) for name in KINDS}
    chosen = columns[kind]
    largest = max((abs(value) for value in chosen if value is not None), default=0.0)
    shown = [
        {
            "text": str(text),
            "id": ids[number] if number < len(ids) else "–",
            "share": (chosen[number] or 0.0) / largest if largest else 0.0,
            **{name: column[number] for name, column in columns.items()},
        }
        for number, text in enumerate(texts)
    ]
    order = sorted(shown, key=lambda token: -abs(token["share"]))
    known = any(value is not None for value in chosen)
    return {
        "all": shown,
        "top": order[:MOST] if largest else [],
        "largest": largest,
        "known": known,
    }


def _column(tokens: dict[str, Any], name: str) -> list[Any]:
    column = tokens.get(name)
    return column if isinstance(column, list) else []


def _numbers(tokens: dict[str, Any], name: str, num: int) -> list[float | None]:
    column = _column(tokens, name)
    found = [
        float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
        for value in column[:num]
    ]
    return found + [None] * (num - len(found))
