"""What the documentation tells people to type is valid, and its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from rlhf_ray import cli
from rlhf_ray.config import load
from rlhf_ray.config.key_aliases import aliases
from rlhf_ray.config.load import keys
from rlhf_ray.doctor.node_readings import PORTS
from rlhf_ray.doctor.node_verdicts import PRIVATE_PORTS

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
MIGRATING = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")


def commands(text: str, program: str) -> list[list[str]]:
    """Words of each command in the text's bash blocks that runs a program."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for words in map(shlex.split, lines) if program in words]


@pytest.mark.parametrize("words", commands(MIGRATING, "rlhf-ray"), ids=lambda words: words[1])
def test_our_commands_are_valid(words: list[str]) -> None:
    _, command, config, *overrides = words
    assert command in typer.main.get_command(cli.app).commands
    load(ROOT / config, overrides)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_commands_that_pages_name_are_there(page: Path) -> None:
    named = set(re.findall(r"\brlhf-ray ([a-z]+)", page.read_text(encoding="utf-8")))
    assert named <= set(typer.main.get_command(cli.app).commands)


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


def test_the_refusal_that_is_shown_is_the_one_that_is_printed() -> None:
    from rlhf_ray.errors import ConfigError

    shown = re.search(r"\$ rlhf-ray plan (\S+) (.*)\nError: ([^`]*)\n```", MIGRATING)
    assert shown
    config, overrides, message = shown.groups()
    with pytest.raises(ConfigError) as caught:
        load(ROOT / config, overrides.split())
    assert str(caught.value) == message
