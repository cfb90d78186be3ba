"""Arguments that commands share, and reading the config that they name."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.config import Config, load
from rlhf_ray.errors import ConfigError

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file, or the folder of a run.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Dotted keys on top, e.g. run.seed=1."),
]

OneModel = Annotated[
    str,
    typer.Option(help="sft, dpo, ppo (ppo@best, ppo@7: other commits), reward, or a path."),
]
ManyModels = Annotated[
    list[str] | None,
    typer.Option(
        "--model", help="sft, dpo, ppo (ppo@best, ppo@7), or a path; repeatable. Default: all."
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(min=0.0, help="0: the likeliest token. Default: rollout.temperature."),
]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Longest answer. Default: rollout.max_tokens.")
]


def read_config(path: Path, overrides: list[str] | None) -> Config:
    """The config that a command was given.

    Raises:
        ConfigError: see `rlhf_ray.config.load`.
    """
    if path.is_dir():
        path = path / "config.yaml"
        if not path.is_file():
            raise ConfigError(f"{path.parent} is no run: it has no config.yaml; name a YAML file")
    return load(path, overrides or [])
