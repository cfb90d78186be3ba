"""docs/recipe.md lists every capability once, each with a test that is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| (\d+) \| .+ \| .+ \| `(\S+?)::(\S+)` \|$", re.MULTILINE)
ROWS = ROW.findall((ROOT / "docs" / "recipe.md").read_text(encoding="utf-8"))


def test_all_42_are_listed_in_order() -> None:
    assert [int(number) for number, *_ in ROWS] == list(range(1, 43))


@pytest.mark.parametrize(("number", "file", "name"), ROWS, ids=[row[0] for row in ROWS])
def test_its_test_is_there(number: str, file: str, name: str) -> None:
    scope: ast.AST = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for part in name.split("::"):
        found = {getattr(node, "name", None): node for node in ast.iter_child_nodes(scope)}
        assert part in found, f"{number}: {file} has no {name}"
        scope = found[part]
