"""The command line: ``rlhf-ray COMMAND CONFIG [key=value ...]``. Imports heavy things late."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.config import Config, load
from rlhf_ray.errors import ConfigError, RlhfError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train language models with human feedback on a Ray cluster.\n\n"
    "Every command takes a CONFIG (a YAML file, or the folder of a run) and overrides such as "
    "ppo.iterations=20.",
)

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file, or the folder of a run.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Dotted keys on top, e.g. run.seed=1."),
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


@app.command()
def run(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run the whole pipeline; goes on where an earlier run of the same name stopped."""
    from rlhf_ray.stages.pipeline import run as run_pipeline

    resolved = read_config(config, overrides)
    folder = run_pipeline(resolved)
    if "report" in resolved.run.stages:
        typer.echo(f"Report: {folder / 'report.html'}")


def _stage_command(stage: str) -> Callable[..., None]:
    def command(config: ConfigPath, overrides: Overrides = None) -> None:
        from rlhf_ray.stages.pipeline import run_single

        typer.echo(f"Wrote {run_single(read_config(config, overrides), stage) / stage}")

    return command


for _stage, _help in {
    "prepare": "Turn a Stack Exchange dump into disjoint sets.",
    "pretrain": "Train a causal language model on packed text.",
    "sft": "Fine-tune on questions and answers, with LoRA, then merge.",
    "reward": "Train the pairwise reward model.",
    "dpo": "Train the policy on pairs directly, without a reward model.",
    "ppo": "Train the policy by PPO; goes on from its last commit.",
    "evaluate": "Compare SFT and PPO on held-out questions.",
}.items():
    app.command(_stage, help=_help)(_stage_command(_stage))


@app.command()
def merge(config: ConfigPath, overrides: Overrides = None) -> None:
    """Merge the run's newest policy adapter into its base."""
    from rlhf_ray.stages.merge import run as run_merge

    typer.echo(f"Wrote {run_merge(read_config(config, overrides))['model']}")


@app.command()
def plan(config: ConfigPath, overrides: Overrides = None) -> None:
    """Resolve and validate a config; print what would run where."""
    from rlhf_ray.stages.plan import describe

    typer.echo(describe(read_config(config, overrides)))


@app.command()
def report(config: ConfigPath, overrides: Overrides = None) -> None:
    """Draw the HTML report of a run again."""
    from rlhf_ray.observability.report import build

    typer.echo(f"Report: {build(Path(read_config(config, overrides).run.dir))}")


@app.command()
def doctor() -> None:
    """Check this machine, and say what to fix."""
    from rlhf_ray import preflight

    raise typer.Exit(preflight.main(["--installed"]))


@app.command()
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Tables for people instead: docs/config.md.")
    ] = False,
) -> None:
    """Print the JSON Schema of the config."""
    import json

    from rlhf_ray.config import reference

    text = reference.markdown() if markdown else json.dumps(Config.model_json_schema(), indent=2)
    typer.echo(text.rstrip())


def main() -> None:
    """Entry point: errors of ours become one message and their exit code."""
    from rlhf_ray.observability.quiet import silence_dependencies

    silence_dependencies()
    try:
        app()
    except RlhfError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("Interrupted; what was committed is kept, and the run can go on", err=True)
        sys.exit(130)
