"""What other systems call our keys, for whoever writes one of their names into a config of ours."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_ray.config import foreign_tables


@dataclass(frozen=True)
class ForeignKey:
    """One name in another system."""

    system: str
    """`TRL`, `OpenRLHF` or `verl`."""
    name: str
    """Their name; dots part sections."""
    ours: str
    """Our dotted key; `{stage}` is the supervised stage that is configured."""
    note: str
    """What differs; may be empty."""


_STAGES = ("pretrain", "sft", "reward", "dpo")


def _read(system: str, table: str) -> list[ForeignKey]:
    rows = [line.split(None, 2) for line in table.strip().splitlines()]
    return [ForeignKey(system, name, ours, *(note or [""])) for name, ours, *note in rows]


FOREIGN_KEYS: tuple[ForeignKey, ...] = (
    *_read("TRL", foreign_tables.TRL),
    *_read("OpenRLHF", foreign_tables.OPENRLHF),
    *_read("verl", foreign_tables.VERL),
)
SUPERVISED_KEYS: tuple[ForeignKey, ...] = tuple(_read("TRL", foreign_tables.TRL_SUPERVISED))


def hints(key: str, value: Any, known: Collection[str]) -> list[str]:
    """A sentence for each name of another system that an unknown key is, or holds.

    Args:
        key: dotted, as it stands in the config.
        value: what stands there; of a section, as verl nests its keys, each key is looked up.
        known: every dotted key of ours.
    """
    found: dict[tuple[str, str, str], list[str]] = {}
    for leaf in _leaves(key.replace("-", "_").lstrip("_"), value):
        for match in _matches(leaf):
            if match.ours in known:
                systems = found.setdefault((match.name, match.ours, match.note), [])
                systems.append(match.system)
    return [
        f"{' and '.join(systems)}'s {name} is our {ours}{f' ({note})' if note else ''}."
        for (name, ours, note), systems in found.items()
    ]


def markdown() -> str:
    """The whole of ``docs/other_names.md``."""
    lines = [
        "# What other systems call our keys",
        "",
        "Generated from `rlhf_ray/config/key_aliases.py` by `scripts/docs.sh`. One of their names",
        "in a config is refused with the hint that stands here. What ours mean:",
        "[config.md](config.md); STAGE is `pretrain`, `sft`, `reward` or `dpo`.",
    ]
    tables = {"TRL": [*_named("TRL"), *SUPERVISED_KEYS]}
    tables |= {system: _named(system) for system in ("OpenRLHF", "verl")}
    for system, rows in tables.items():
        lines += ["", f"## {system}", "", f"| {system} | ours | mind |", "|---|---|---|"]
        for row in rows:
            ours = row.ours.replace("{stage}", "STAGE")
            lines.append(f"| `{row.name}` | `{ours}` | {row.note.replace('{stage}', 'STAGE')} |")
    return "\n".join(lines) + "\n"


def _named(system: str) -> list[ForeignKey]:
    return [row for row in FOREIGN_KEYS if row.system == system]


def _leaves(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _leaves(f"{key}.{name}", item)
    else:
        yield key


def _matches(key: str) -> list[ForeignKey]:
    """Rows of the whole key, else of its last part: their keys may stand in a section of ours."""
    section, _, leaf = key.rpartition(".")
    if section in _STAGES:
        rows = [row for row in SUPERVISED_KEYS if row.name == leaf]
        return [
            ForeignKey(
                row.system,
                row.name,
                row.ours.replace("{stage}", section),
                row.note.replace("{stage}", section),
            )
            for row in rows
        ]
    for name in (key, leaf):
        rows = [row for row in FOREIGN_KEYS if row.name == name]
        if rows:
            return rows
    return []
