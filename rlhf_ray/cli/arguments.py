"""Arguments that several commands share, and the config that they name."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.config import Config, load
from rlhf_ray.errors import ConfigError
from rlhf_ray.secrecy import printable

ConfigPath = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG", help="A YAML file, a run's folder, or @NAME for a shipped config."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Config keys to override, such as run.seed=1."),
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
PolicyModel = Annotated[
    str, typer.Option(help="sft, dpo, ppo, ppo@best, ppo@7 or a path to a language model.")
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
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Longest answer in tokens. Default: rollout.max_tokens.")
]


def read_config(path: Path, overrides: list[str] | None) -> Config:
    """Read the config that a command names: a YAML file, or the one in a run's folder."""
    if os.path.isdir(path):  # False also for a name that is too long, where Path would raise
        path = path / "config.yaml"
        if not path.is_file():
            raise ConfigError(
                f"{path.parent} is not the folder of a run: it has no config.yaml. Name a YAML file"
            )
    return load(path, overrides or [])


def print_json(value: object) -> None:
    """Print a value as indented JSON."""
    typer.echo(printable(json.dumps(value, indent=2, ensure_ascii=False)))
