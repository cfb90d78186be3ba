"""Commands that train: the whole pipeline or one stage, and what is written from its models."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.cli.arguments import (
    ConfigPath,
    OneModel,
    Overrides,
    Retries,
    StageModel,
    read_config,
    split_versions,
)
from rlhf_ray.cli.inspection import CHECK
from rlhf_ray.cli.models import USE
from rlhf_ray.cli.starting import init
from rlhf_ray.config import Config
from rlhf_ray.config.stages import STAGES
from rlhf_ray.errors import ConfigError

app = typer.Typer()

TRAIN = "Train and evaluate"


app.command(
    rich_help_panel=TRAIN,
    epilog="Example: rlhf-ray init --model ./my-model --data pairs.jsonl --gpus 1xA100-80GB",
)(init)


@app.command(
    rich_help_panel=TRAIN, epilog="Example: rlhf-ray run configs/quickstart.yaml ppo.iterations=20"
)
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    rehearse_first: Annotated[
        bool,
        typer.Option(
            "--rehearse", help="Rehearse PPO first, unless this config has been rehearsed already."
        ),
    ] = False,
    retries: Retries = 0,
) -> None:
    """Run the whole pipeline; resume where an earlier run of the same name stopped.

    The path of the report is printed at the end.
    """
    resolved = read_config(config, overrides)
    if retries:
        from rlhf_ray.jobs.retries import DRIVER, run_with_retries

        arguments = [str(config), *(overrides or ()), *["--rehearse"] * rehearse_first]
        folder = Path(resolved.run.dir)
        raise typer.Exit(
            run_with_retries([*DRIVER, "run", *arguments], folder, retries, typer.echo)
        )
    from rlhf_ray.stages.pipeline import run as run_pipeline
    from rlhf_ray.stages.rehearse import is_needed

    if rehearse_first and is_needed(resolved) and not _rehearsed(resolved):
        return
    report = run_pipeline(resolved) / "report.html"
    if report.is_file():
        typer.echo(f"Report: {report}")


@app.command(
    rich_help_panel=TRAIN,
    epilog="Example: rlhf-ray branch runs/my-run@412 run.name=lower-kl ppo.kl_coef=0.05",
)
def branch(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN@VERSION", help="A run's folder, and the commit: a number, latest or best."
        ),
    ],
    overrides: Overrides = None,
) -> None:
    """Make a new run that starts from a commit of another one, with other settings.

    run.name names it. What may change on resume may change here. The other run is only read: the
    new one has copies of all but the models before PPO, which it reads where they are.
    """
    from rlhf_ray.runs.branch import branch as make_branch

    folder, versions = split_versions(run)
    if len(versions) != 1:
        raise ConfigError(f"Name one commit to start from, as in {folder}@412; got {run}")
    made = make_branch(read_config(folder, []), read_config(folder, overrides), versions[0])
    origin = made.origin
    typer.echo(
        f"Wrote {made.folder}, which starts from version {origin.version} of {origin.run} with "
        f"{max(0, made.num_left)} iterations left. Start it: rlhf-ray run {made.folder}"
    )


@app.command(rich_help_panel=CHECK)
def rehearse(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run two worst-case PPO iterations and compare memory and time with the plan."""
    _rehearsed(read_config(config, overrides))


def _rehearsed(config: Config) -> bool:
    """Rehearse; return whether it finished rather than being stopped on request."""
    from rlhf_ray.planning.plan import prediction_for
    from rlhf_ray.planning.rehearsal import as_text
    from rlhf_ray.stages.rehearse import run as run_rehearsal

    measured = run_rehearsal(config)
    if measured is not None:
        typer.echo(as_text(measured, prediction_for(config)))
    return measured is not None


def _stage_command(stage: str) -> Callable[..., None]:
    def command(config: ConfigPath, overrides: Overrides = None) -> None:
        from rlhf_ray.stages.pipeline import run_single

        typer.echo(f"Wrote {run_single(read_config(config, overrides), stage) / stage}")

    return command


for _name, _stage in STAGES.items():
    # The command report also draws an unfinished run's, and rank shows the page alone.
    if _name not in ("report", "rank"):
        app.command(_name, help=_stage.does, rich_help_panel=TRAIN)(_stage_command(_name))


@app.command(rich_help_panel=USE)
def merge(config: ConfigPath, overrides: Overrides = None, model: OneModel = "ppo") -> None:
    """Merge one of a run's adapters into its base model."""
    from rlhf_ray.serving.merge import run as run_merge

    resolved = read_config(config, overrides)
    summary = run_merge(resolved, model)
    typer.echo(f"Wrote {summary['model']}; {_survived(resolved, summary['survived'])}")


class ExportKind(StrEnum):
    """The parts of a model that can be exported."""

    ADAPTER = "adapter"
    MERGED = "merged"


@app.command(
    rich_help_panel=USE, epilog="Example: rlhf-ray export runs/my-run --kind merged --out my-model"
)
def export(
    config: ConfigPath,
    overrides: Overrides = None,
    model: StageModel = "ppo",
    kind: Annotated[
        ExportKind, typer.Option(help="Export the adapter alone or the merged model.")
    ] = ExportKind.ADAPTER,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to. Default: export/ in the run's folder.")
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="Also upload the folder to this repository of the model hub, with HF_TOKEN.",
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="A repository that is made by --push is public.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what --push would upload.")
    ] = False,
) -> None:
    """Export a model for other tools, with a model card that states its origin."""
    from rlhf_ray.serving import push as hub
    from rlhf_ray.serving.export import run as run_export

    if push is None and (public or dry_run):
        raise ConfigError("--public and --dry-run are for --push OWNER/NAME, which is missing")
    resolved = read_config(config, overrides)
    summary = run_export(resolved, model=model, kind=kind.value, out=out)
    survived = summary["survived"]
    note = "" if survived is None else f"; {_survived(resolved, survived)}"
    typer.echo(f"Wrote {summary['folder']}{note}")
    if push is not None and dry_run:
        files = hub.files_of(Path(summary["folder"]))
        typer.echo(f"Would upload to {push} ({'public' if public else 'private'}, if it is new):")
        for name, size in files.items():
            typer.echo(f"  {size / 1e6:10.3f} MB  {name}")
        typer.echo(f"  {sum(files.values()) / 1e6:10.3f} MB in all")
    elif push is not None:
        typer.echo(f"Uploaded to {hub.push(Path(summary['folder']), push, private=not public)}")


def _survived(config: Config, share: float) -> str:
    return (
        f"after rounding to {config.model.dtype}, {share:.2%} of the weights that the adapter "
        "changes still differ from the base"
    )
