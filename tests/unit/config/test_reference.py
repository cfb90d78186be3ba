from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from rlhf_ray.config import reference
from rlhf_ray.config.identity import fixed_keys
from rlhf_ray.config.load import keys
from rlhf_ray.config.root import Config
from rlhf_ray.config.section import Section, changeable, fixed

ROOT = Path(__file__).parents[3]


class Inner(Section):
    """The inner section."""

    steps: int = fixed(2, unit="steps", ge=1, lt=9, description="Steps a | b.")
    kind: Literal["x", "y"] = changeable("x", description="Which <one>.")


class Outer(Section):
    """The outer section."""

    one: Inner = fixed(Inner(steps=3), description="First.")
    many: list[Inner] = Field(default=[], description="Others.", max_length=4)
    maybe: Inner | None = fixed(None, description="Perhaps.")
    name: str = fixed(..., description="Needed.")
    rates: dict[str, float] = fixed({"a": 0.5}, description="By name.")


class Top(Section):
    """The root."""

    outer: Outer = fixed(Outer(name="n"), description="All.")


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(reference, "Config", Top)
    return reference.markdown()


def test_the_page_is_up_to_date() -> None:
    if (ROOT / "docs" / "config.md").read_text() != reference.markdown():
        pytest.fail("docs/config.md is out of date: run scripts/docs.sh")


def test_every_number_has_a_unit_and_nothing_else_has_one() -> None:
    for section in Config.model_json_schema()["$defs"].values():
        for key, entry in section["properties"].items():
            assert ("unit" in entry) == reference.is_number(entry), key


def test_a_row_shows_type_bounds_default_and_meaning(page: str) -> None:
    assert "| `steps` | integer, ≥ 1, < 9 | steps | `2` | fixed | Steps a \\| b. |" in page
    assert "| `kind` | `x` or `y` |  | `x` | may change | Which \\<one>. |" in page
    assert "| `name` | text |  | required | fixed | Needed. |" in page
    assert "| `rates` | mapping to number |  | `{a: 0.5}` | fixed | By name. |" in page
    assert "| `many` | list of (section), at most 4 of them |  | `[]` | fixed | Others. |" in page
    assert "| `maybe` | section or `null` |  | `null` | fixed | Perhaps. |" in page


def test_a_section_names_every_key_that_holds_it_and_what_differs_there(page: str) -> None:
    assert "## `outer.one`, `outer.many[]`, `outer.maybe`\n\nThe inner section.\n" in page
    assert "| `one` | section |  | `{steps: 3}` |  | First. |" in page


def test_every_key_has_a_row_under_a_heading_that_names_its_section() -> None:
    page = reference.markdown()
    tables: dict[str, str] = {}
    for block in page.split("\n## ")[1:]:
        heading, _, rows = block.partition("\n")
        places, _, _ = heading.replace("`", "").partition(" of type ")
        for place in places.split(", "):
            section = place.replace("[]", "").replace(".NAME", "")
            tables[section] = tables.get(section, "") + rows
    for key in keys():
        section, _, name = key.rpartition(".")
        assert not section or f"\n| `{name}` |" in tables[section], key
    for key in fixed_keys(Config):
        section, _, name = key.rpartition(".")
        if not section:
            continue  # a list of sections, which has tables but no row
        (row,) = [line for line in tables[section].splitlines() if line.startswith(f"| `{name}` |")]
        assert "| fixed |" in row, key
