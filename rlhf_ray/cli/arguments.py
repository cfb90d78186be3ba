"""Arguments that several commands share, and the config that they name."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.config import read_config as read_config
from rlhf_ray.errors import ConfigError
from rlhf_ray.secrecy import printable

ConfigPath = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG", help="A YAML file, a run's folder, or @NAME for a shipped config."
    ),
]
RunVersions = Annotated[
    Path,
    typer.Argument(
        metavar="RUN[@VERSION,...]",
        help="A config or a run's folder; @100,200,latest names versions of its policy.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Config keys to override, such as run.seed=1."),
]

Retries = Annotated[
    int,
    typer.Option(min=0, help="Start the driver again, to resume, up to N times after it died."),
]

OneModel = Annotated[
    str,
    typer.Option(
        help="sft, dpo, ppo, reward or a path; ppo@best and ppo@7 name other commits of PPO."
    ),
]
StageModel = Annotated[
    str, typer.Option(help="sft, dpo, ppo or reward; ppo@best and ppo@7 name other commits of PPO.")
]
ManyModels = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help="sft, dpo, ppo, ppo@best, ppo@7 or a path; may be repeated. Default: all models.",
    ),
]
Temperature = Annotated[
    float | None, typer.Option(min=0.0, help="0 decodes greedily. Default: rollout.temperature.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port on loopback. Default: a free one.")]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Longest answer in tokens. Default: rollout.max_tokens.")
]


def split_versions(path: Path) -> tuple[Path, list[str]]:
    """Split ``RUN@100,latest`` into the run and its versions; none of a path without them.

    A file or folder of that very name is itself, and so is ``@NAME``, a shipped config.
    """
    run, mark, versions = str(path).rpartition("@")
    if not mark or not run or "/" in versions or os.path.lexists(path):
        return path, []
    names = [name.strip() for name in versions.split(",")]
    if not all(names):
        raise ConfigError(f"{path} names no version after a comma or @, as in {run}@100,latest")
    return Path(run), list(dict.fromkeys(names))


def policies_at(versions: Sequence[str]) -> list[str]:
    """Return the names of a run's policy at versions."""
    return [f"ppo@{version}" for version in versions]


def print_json(value: object) -> None:
    """Print a value as indented JSON."""
    typer.echo(printable(json.dumps(value, indent=2, ensure_ascii=False)))
