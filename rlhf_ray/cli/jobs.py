"""Commands for runs of a cluster: send one, watch it, change it, end it."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_ray.cli.arguments import ConfigPath, Overrides, read_config

app = typer.Typer()

RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="Name of a run, its folder, or its submission id.")
]
Address = Annotated[
    str | None,
    typer.Option(
        help="Dashboard of the cluster, http://HOST:8265. Default: RAY_API_SERVER_ADDRESS, "
        "RAY_ADDRESS, this machine's."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")]


@app.command()
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Address = None,
    working_dir: Annotated[
        Path, typer.Option(help="Folder that is sent, without runs, data and environments.")
    ] = Path(),
    follow: Annotated[
        bool, typer.Option("--follow", help="Print what it prints; end with its exit code.")
    ] = False,
    rehearse: Annotated[
        bool,
        typer.Option(help="Rehearse PPO first, where it can be and this config was not."),
    ] = True,
    retries: Annotated[
        int, typer.Option(min=0, help="Submit again to go on where it fails; follows it.")
    ] = 0,
) -> None:
    """Send a run to a cluster as a Ray job."""
    from rlhf_ray.jobs import server as job_server
    from rlhf_ray.jobs import submit as submission

    resolved = read_config(config, overrides)
    submission.require_for_a_cluster(resolved)
    server = job_server.connect(address)
    job = submission.submit(resolved, server, working_dir, rehearse=rehearse)
    typer.echo(f"Submitted {job.id}: rlhf-ray status {job.id}, rlhf-ray logs {job.id} --follow")
    if follow or retries:
        with _watching(job.id):
            code = submission.follow(
                resolved, server, working_dir, job, _write, retries, rehearse=rehearse
            )
        raise typer.Exit(code)


@app.command("list")
def list_runs(address: Address = None, as_json: AsJson = False) -> None:
    """List the runs of a cluster."""
    from rlhf_ray.jobs.server import connect
    from rlhf_ray.jobs.tables import list_table

    jobs = connect(address).jobs()
    if as_json:
        _print_json([asdict(job) for job in jobs])
    else:
        _print(list_table(jobs))


@app.command()
def status(run: RunName, address: Address = None, as_json: AsJson = False) -> None:
    """Show how a run stands: stage, iteration, reward, KL, generators, ETA."""
    from rlhf_ray.jobs.runs import find_run
    from rlhf_ray.jobs.tables import status_table

    found = find_run(run, address).status()
    if as_json:
        _print_json(asdict(found))
    else:
        _print(status_table(found))


@app.command()
def logs(
    run: RunName,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Until the run ends.")] = False,
) -> None:
    """Print what a run prints."""
    from rlhf_ray.jobs.runs import find_run

    with _watching(run):
        for text in find_run(run, address).logs(follow):
            _write(text)


@app.command()
def stop(
    run: RunName,
    address: Address = None,
    now: Annotated[
        bool, typer.Option("--now", help="At once; go on later from the last saved commit.")
    ] = False,
) -> None:
    """End a run: PPO commits and saves the iteration that it is in; it can go on later."""
    from rlhf_ray.jobs.runs import find_run

    find_run(run, address).stop(now, typer.echo)


@app.command()
def scale(
    run: RunName,
    generators: Annotated[int, typer.Option(min=1, help="How many there shall be.")],
    address: Address = None,
) -> None:
    """Change the number of generators while a run goes on."""
    from rlhf_ray.jobs.runs import find_run

    find_run(run, address).scale(generators)
    typer.echo(f"Asked for {generators} generators; rlhf-ray status {run} shows them come and go")


@contextmanager
def _watching(run: str) -> Iterator[None]:
    """Whoever stops watching shall know that the run does not stop."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\nThe run goes on: rlhf-ray logs {run} --follow, rlhf-ray stop {run}")
        raise typer.Exit(0) from None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print(table: Any) -> None:
    from rich.console import Console

    Console(soft_wrap=not sys.stdout.isatty()).print(table)


def _print_json(values: Any) -> None:
    typer.echo(json.dumps(values, indent=2))
