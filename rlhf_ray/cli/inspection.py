"""Commands that look: at a config, a run, a machine."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.cli.arguments import ConfigPath, Overrides, read_config
from rlhf_ray.config import Config

app = typer.Typer()


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="NODESxGPUSxKIND",
            help="Such as 3x8xA100-80GB, 8xA100-80GB+2x4xL40S-48GB, or live (the Ray cluster "
            "there is). Default: live where the run would join that cluster, else this machine.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not tables.")] = False,
) -> None:
    """Say what a config takes of a cluster: memory, places, time; exit 1 if it does not fit."""
    from rlhf_ray.planning import plan as planning

    found, changes, layouts = planning.plan_for(read_config(config, overrides), cluster)
    if as_json:
        import json

        typer.echo(json.dumps(planning.as_json(found, changes, layouts), indent=2))
    else:
        typer.echo(planning.as_text(found, changes, layouts))
    raise typer.Exit(0 if found.fits else 1)


@app.command()
def report(config: ConfigPath, overrides: Overrides = None) -> None:
    """Draw the HTML report of a run again."""
    from rlhf_ray.report.report import build

    typer.echo(f"Report: {build(Path(read_config(config, overrides).run.dir))}")


@app.command()
def dashboards(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("dashboards"),
    no_commit_minutes: Annotated[
        float, typer.Option(min=1, help="Alarm when a run has not committed for so long.")
    ] = 60.0,
    max_kl: Annotated[
        float, typer.Option(min=0, help="Alarm when the KL to the reference is higher, nats.")
    ] = 50.0,
) -> None:
    """Write a Grafana dashboard and Prometheus's configuration with alarms, for Ray's dashboard."""
    from rlhf_ray.observability.dashboards.files import write
    from rlhf_ray.observability.dashboards.prometheus import Bounds

    typer.echo(write(out, Bounds(no_commit_minutes, max_kl)))


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Its paths are checked on all nodes.")
    ] = None,
    overrides: Overrides = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Every node of the Ray cluster instead.")
    ] = False,
    min_bandwidth: Annotated[
        float, typer.Option(min=0.0, help="Gbit/s that every two nodes must reach.")
    ] = 1.0,
) -> None:
    """Check this machine, or every node of a cluster, and say what to fix."""
    from rlhf_ray.doctor import preflight

    if not cluster:
        raise typer.Exit(preflight.main(["--installed"]))
    from rlhf_ray.doctor import cluster as cluster_doctor

    resolved = read_config(config, overrides) if config else None
    sections, is_healthy = cluster_doctor.run(resolved, min_bandwidth)
    for title, checks in sections:
        typer.echo(f"{title}:\n{preflight.format_table(checks)}")
    raise typer.Exit(0 if is_healthy else 1)


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
