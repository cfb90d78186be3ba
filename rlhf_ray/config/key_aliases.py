"""Names of our keys in other systems: hints for users who write one of them into a config."""

import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from itertools import chain

from rlhf_ray.config import stages
from rlhf_ray.config.section import is_mapping

SUPERVISED = "TRL supervised"
"""Heading of the names that TRL's supervised trainers use; the other headings are systems."""


@dataclass(frozen=True)
class KeyAlias:
    """One name in another system."""

    system: str
    """`TRL`, `OpenRLHF` or `verl`."""
    name: str
    """Their name, with dots between sections."""
    ours: str
    """Our dotted key; `{stage}` stands for the supervised stage that is configured."""
    note: str = ""
    """What differs; may be empty."""

    def for_stage(self, stage: str) -> "KeyAlias":
        """The alias with `{stage}` filled in."""
        ours, note = (text.replace("{stage}", stage) for text in (self.ours, self.note))
        return replace(self, ours=ours, note=note)


@functools.cache
def aliases() -> Mapping[str, list[KeyAlias]]:
    """Return the names in `key_aliases.txt` by heading; read only once a key is unknown."""
    table = resources.files("rlhf_ray.config") / "key_aliases.txt"
    found: dict[str, list[KeyAlias]] = {}
    heading = ""
    for line in table.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            heading = line.strip("[]")
            found[heading] = []
        elif line and not line.startswith("#"):
            found[heading].append(KeyAlias(heading.split()[0], *line.split(None, 2)))
    return found


def hints(key: str, value: object, known: Collection[str]) -> list[str]:
    """Return a sentence for each name of another system in an unknown key.

    Args:
        key: dotted, as it stands in the config.
        value: its value; each key of a mapping is looked up, because verl nests its keys.
        known: every dotted key of ours.
    """
    systems: dict[KeyAlias, list[str]] = {}
    for leaf in _leaves(key.replace("-", "_").lstrip("_"), value):
        for alias in _matches(leaf):
            if alias.ours in known:
                systems.setdefault(replace(alias, system=""), []).append(alias.system)
    return [
        f"{' and '.join(names)}'s {alias.name} is our {alias.ours}"
        f"{f' ({alias.note})' if alias.note else ''}."
        for alias, names in systems.items()
    ]


def markdown() -> str:
    """Return the whole of ``docs/other_names.md``."""
    lines = [
        "# What other systems call our keys",
        "",
        "Generated from `rlhf_ray/config/key_aliases.txt` by `scripts/docs.sh`. A config that uses",
        "one of their names is refused with the hint in this table. What our keys mean:",
        f"[config.md](config.md); STAGE is one of {', '.join(stages.SUPERVISED)}.",
    ]
    by_system: dict[str, list[KeyAlias]] = {}
    for alias in chain.from_iterable(aliases().values()):
        by_system.setdefault(alias.system, []).append(alias.for_stage("STAGE"))
    for system, rows in by_system.items():
        lines += ["", f"## {system}", "", f"| {system} | ours | mind |", "|---|---|---|"]
        lines += [f"| `{row.name}` | `{row.ours}` | {row.note} |" for row in rows]
    return "\n".join(lines) + "\n"


def _leaves(key: str, value: object) -> Iterator[str]:
    if is_mapping(value) and value:
        for name, item in value.items():
            yield from _leaves(f"{key}.{name}", item)
    else:
        yield key


def _matches(key: str) -> list[KeyAlias]:
    """Aliases of the whole key, else of its last part: their keys may stand in our sections."""
    section, _, leaf = key.rpartition(".")
    if section in stages.SUPERVISED:
        return [row.for_stage(section) for row in aliases()[SUPERVISED] if row.name == leaf]
    systems = [row for heading, rows in aliases().items() if heading != SUPERVISED for row in rows]
    return next(
        (rows for name in (key, leaf) if (rows := [r for r in systems if r.name == name])),
        list[KeyAlias](),
    )
