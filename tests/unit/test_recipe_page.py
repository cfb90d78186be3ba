"""docs/recipe.md lists every capability once, each with a test (`test_docs` looks for it)."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| (\d+) \| .+ \| .+ \| `(\S+?)::(\S+)` \|$", re.MULTILINE)


def test_all_42_are_listed_in_order() -> None:
    rows = ROW.findall((ROOT / "docs" / "recipe.md").read_text(encoding="utf-8"))
    assert [int(number) for number, *_ in rows] == list(range(1, 43))
