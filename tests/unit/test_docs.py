"""Commands and configs in the documentation are valid, and its links lead somewhere."""

import ast
import importlib
import pkgutil
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from rlhf_ray import cli
from rlhf_ray.config import Config, load, resolve
from rlhf_ray.config.key_aliases import aliases
from rlhf_ray.config.load import keys
from rlhf_ray.doctor.node_readings import PORTS
from rlhf_ray.doctor.node_verdicts import PRIVATE_PORTS

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
MIGRATING = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")


COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


def blocks(text: str, language: str) -> list[str]:
    """The text's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str, program: str) -> list[list[str]]:
    """Words of each command in the text's blocks for a shell that runs a program."""
    lines = [line for block in blocks(text, "bash") for line in _joined(block)]
    lines += [
        line.removeprefix("$ ")
        for block in blocks(text, "console")
        for line in _joined(block)
        if line.startswith("$ ")
    ]
    words = [shlex.split(line, comments=True) for line in lines]
    return [found for found in words if program in found]


def _joined(block: str) -> list[str]:
    return block.replace("\\\n", " ").splitlines()


OURS = [
    (page.name, words[words.index("rlhf-ray") + 1 :])
    for page in (ROOT / "README.md", *PAGES)
    for words in commands(page.read_text(encoding="utf-8"), "rlhf-ray")
]
SNIPPETS = [
    pytest.param(language, block, id=f"{page.name}-{language}-{number}")
    for page in (ROOT / "README.md", *PAGES)
    for language in ("python", "yaml")
    for number, block in enumerate(blocks(page.read_text(encoding="utf-8"), language))
]


@pytest.mark.parametrize("words", [pytest.param(w, id=f"{name}-{w[0]}") for name, w in OURS])
def test_our_commands_are_valid(words: list[str]) -> None:
    command, *arguments = words
    for sign in ("|", "&&", "&", ">"):
        arguments = arguments[: arguments.index(sign)] if sign in arguments else arguments
    parsed = COMMANDS[command].make_context(command, [*arguments]).params
    config, overrides = parsed.get("config"), parsed.get("overrides") or []
    named = {override.partition("=")[0] for override in overrides}
    assert named <= set(keys()) | {name for name in named if ".columns." in name}
    if config is not None and (ROOT / config).is_file():
        load(ROOT / config, overrides)


@pytest.mark.parametrize(("language", "block"), SNIPPETS)
def test_snippets_are_valid(language: str, block: str) -> None:
    if language == "yaml":
        values = yaml.safe_load(block)
        if set(values) <= {*Config.model_fields, "extends"}:
            values.pop("extends", None)
            resolve(values)
        return
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlhf_ray"):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_commands_that_pages_name_are_there(page: Path) -> None:
    named = set(re.findall(r"\brlhf-ray ([a-z]+)", page.read_text(encoding="utf-8")))
    assert named <= set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_pages_name_are_there(page: Path) -> None:
    named = re.findall(r"`(tests/\S+?\.py)::(\S+?)`", page.read_text(encoding="utf-8"))
    for file, name in named:
        scope: ast.AST = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        for part in name.split("::"):
            found = {getattr(node, "name", None): node for node in ast.iter_child_nodes(scope)}
            assert part in found, f"{file} has no {name}"
            scope = found[part]


def test_every_failure_of_the_support_matrix_names_its_test() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    failures = [row for row in rows if not row.startswith("| failure |")]
    assert len(failures) > 20
    assert not [row for row in failures if not re.search(r"\| `tests/\S+::\S+` \|$", row)]


@pytest.mark.parametrize(
    ("system", "program"),
    [
        ("TRL", "trl"),
        ("TRL", "examples/scripts/ppo/ppo.py"),
        ("OpenRLHF", "openrlhf.cli.train_ppo_ray"),
        ("verl", "verl.trainer.main_ppo"),
    ],
)
def test_their_options_stand_in_the_table_of_names(system: str, program: str) -> None:
    (words,) = commands(MIGRATING, program)
    named = {row.name for rows in aliases().values() for row in rows if row.system == system}
    same = {key.rpartition(".")[2] for key in keys()}
    used = [
        word.lstrip("-").partition("=")[0]
        for word in words[words.index(program) + 1 :]
        if word.startswith("--") or (system == "verl" and "=" in word)
    ]
    assert len(used) > 5
    assert not [name for name in used if name not in named | same]


def test_the_fixed_ports_of_the_security_page_are_looked_at() -> None:
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d, ]+) \|.*\| (.*) \|.*\|$", text, flags=re.MULTILINE)
    places = {int(port): place for ports, place in rows for port in ports.split(",")}
    assert sorted(places) == sorted(PORTS)
    kept = [port for port, place in places.items() if place.startswith("loopback")]
    assert sorted(kept) == sorted(PRIVATE_PORTS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_the_site_has_every_page_and_each_object_that_the_api_page_names() -> None:
    site = yaml.safe_load((ROOT / "scripts" / "site" / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = re.findall(r"[\w.]+\.md", str(site["nav"]))
    assert {page.name for page in PAGES} <= set(listed)
    for name in re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE):
        assert pkgutil.resolve_name(name), name


def test_the_refusal_that_is_shown_is_the_one_that_is_printed() -> None:
    from rlhf_ray.errors import ConfigError

    shown = re.search(r"\$ rlhf-ray plan (\S+) (.*)\nError: ([^`]*)\n```", MIGRATING)
    assert shown
    config, overrides, message = shown.groups()
    with pytest.raises(ConfigError) as caught:
        load(ROOT / config, overrides.split())
    assert str(caught.value) == message
