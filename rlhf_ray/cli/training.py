"""Commands that train: the whole pipeline, one stage, and what is made of its models."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.cli.arguments import ConfigPath, OneModel, Overrides, read_config
from rlhf_ray.config import Config
from rlhf_ray.config.stages import STAGES

app = typer.Typer()


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    rehearse_first: Annotated[
        bool,
        typer.Option("--rehearse", help="Rehearse PPO first, where it can be and was not yet."),
    ] = False,
) -> None:
    """Run the whole pipeline; goes on where an earlier run of the same name stopped."""
    from rlhf_ray.stages.pipeline import run as run_pipeline
    from rlhf_ray.stages.rehearse import is_needed

    resolved = read_config(config, overrides)
    if rehearse_first and is_needed(resolved) and not _rehearsed(resolved):
        return
    report = run_pipeline(resolved) / "report.html"
    if report.is_file():
        typer.echo(f"Report: {report}")


@app.command()
def rehearse(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run two PPO iterations at the worst case, and hold memory and seconds against the plan."""
    _rehearsed(read_config(config, overrides))


def _rehearsed(config: Config) -> bool:
    """Whether a rehearsal came to its end; one that was stopped on request did not."""
    from rlhf_ray.planning.plan import prediction_for
    from rlhf_ray.planning.rehearsal import as_text
    from rlhf_ray.stages.rehearse import run as run_rehearsal

    found = run_rehearsal(config)
    if found is not None:
        typer.echo(as_text(found, prediction_for(config)))
    return found is not None


def _stage_command(stage: str) -> Callable[..., None]:
    def command(config: ConfigPath, overrides: Overrides = None) -> None:
        from rlhf_ray.stages.pipeline import run_single

        typer.echo(f"Wrote {run_single(read_config(config, overrides), stage) / stage}")

    return command


for _name, _stage in STAGES.items():
    if _name != "report":  # its command also draws the report of a run that is going on
        app.command(_name, help=_stage.does)(_stage_command(_name))


@app.command()
def merge(config: ConfigPath, overrides: Overrides = None, model: OneModel = "ppo") -> None:
    """Merge one of the run's adapters into its base."""
    from rlhf_ray.serving.merge import run as run_merge

    resolved = read_config(config, overrides)
    summary = run_merge(resolved, model)
    typer.echo(f"Wrote {summary['model']}; {_survived(resolved, summary['survived'])}")


class ExportKind(StrEnum):
    """What of a model is exported."""

    ADAPTER = "adapter"
    MERGED = "merged"


@app.command()
def export(
    config: ConfigPath,
    overrides: Overrides = None,
    model: OneModel = "ppo",
    kind: Annotated[
        ExportKind, typer.Option(help="The adapter alone, or a whole model.")
    ] = ExportKind.ADAPTER,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; default export/ in the run's folder.")
    ] = None,
) -> None:
    """Write a model for other tools, with a card that says where it comes from."""
    from rlhf_ray.serving.export import run as run_export

    resolved = read_config(config, overrides)
    summary = run_export(resolved, model=model, kind=kind.value, out=out)
    survived = summary["survived"]
    note = "" if survived is None else f"; {_survived(resolved, survived)}"
    typer.echo(f"Wrote {summary['folder']}{note}")


def _survived(config: Config, share: float) -> str:
    return f"{share:.2%} of the weights that it changes kept a change in {config.model.dtype}"
