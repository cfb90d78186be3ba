"""The table of the results: 100 columns, a line for each figure, its goal beside it."""

import textwrap
from collections.abc import Iterator, Sequence

from bench.figures import NOT_RUN
from bench.running import Result

WIDTHS = (15, 27, 16, 22, 7, 8)
"""Of the columns, with a space between two."""
HEADS = ("row", "measure", "against", "figure", "goal", "verdict")
WIDTH = 100


def table(results: Sequence[Result]) -> str:
    """Return the table, and below it why rows were not run."""
    lines = [*_cells(HEADS), "-" * (sum(WIDTHS) + len(WIDTHS) - 1)]
    for result in results:
        name = result["name"]
        for line in result["lines"]:
            figure = line.get("text") or "-"
            goal = line["goal"] or "-"
            lines += _cells((name, line["measure"], line["against"], figure, goal, line["verdict"]))
            name = ""
    for result in results:
        if result["why"]:
            text = f"{result['name']}: {result['why']}"
            lines += ["", *textwrap.wrap(text, WIDTH, subsequent_indent="  ")]
    return "\n".join(lines)


def listing(results: Sequence[Result], seconds: Sequence[int]) -> str:
    """Return every row with its goals, how it is measured, and what it uses."""
    lines: list[str] = []
    for result, each_s in zip(results, seconds, strict=True):
        about = "" if result["why"] else f", about {each_s} s"
        lines.append(f"{result['name']} ({result['uses']}{about})")
        for line in result["lines"]:
            goal = line["goal"] or "reported"
            against = "" if line["against"] == "-" else f", against {line['against']}"
            lines += _indented(f"{line['measure']}{against}: {goal}")
        lines += _indented(result["why"] or result["method"], by=4)
    return "\n".join(lines)


def verdicts(results: Sequence[Result]) -> str:
    """Return the counts of verdicts as a sentence."""
    found = [line["verdict"] for result in results for line in result["lines"]]
    kinds = [kind for kind in ("met", "missed", "reported", NOT_RUN) if kind in found]
    return ", ".join(f"{found.count(kind)} {kind}" for kind in kinds)


def _cells(texts: Sequence[str]) -> Iterator[str]:
    """Yield the lines of a row of cells, each wrapped to its column."""
    columns = [
        textwrap.wrap(text, width) or [""] for text, width in zip(texts, WIDTHS, strict=True)
    ]
    for index in range(max(map(len, columns))):
        parts = [column[index] if index < len(column) else "" for column in columns]
        cells = (part.ljust(width) for part, width in zip(parts, WIDTHS, strict=True))
        yield " ".join(cells).rstrip()


def _indented(text: str, by: int = 2) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * by, subsequent_indent=" " * (by + 2))
