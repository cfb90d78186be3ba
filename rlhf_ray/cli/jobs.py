"""Commands for runs on a Ray cluster: submit, watch, scale and stop them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_ray.cli.arguments import AsJson, ConfigPath, Overrides, Retries, print_json, read_config
from rlhf_ray.secrecy import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

app = typer.Typer()

PANEL = "Run on a cluster"

RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="Name of the run, its folder, or its submission id.")
]
Address = Annotated[
    str | None,
    typer.Option(
        help="Address of the cluster's dashboard, http://HOST:8265. Default: "
        "RAY_API_SERVER_ADDRESS, else RAY_ADDRESS, else this machine."
    ),
]


@app.command(
    rich_help_panel=PANEL, epilog="Example: rlhf-ray submit config.yaml --address http://HEAD:8265"
)
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Address = None,
    working_dir: Annotated[
        Path,
        typer.Option(help="Folder to upload; runs, data and virtual environments are left out."),
    ] = Path(),
    follow: Annotated[
        bool, typer.Option("--follow", help="Print the run's output; exit with its exit code.")
    ] = False,
    rehearse: Annotated[
        bool,
        typer.Option(help="Rehearse PPO first, unless this config has been rehearsed already."),
    ] = True,
    retries: Retries = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print which files would travel.")
    ] = False,
) -> None:
    """Submit a run to a cluster as a Ray job."""
    from rlhf_ray.jobs import connection, submission, working_folder

    resolved = read_config(config, overrides)
    submission.require_for_a_cluster(resolved)
    travelling = working_folder.contents(working_dir)
    if dry_run or travelling.withheld:
        typer.echo(printable(str(travelling)))
    if dry_run:
        return
    server = connection.connect(address)
    job = submission.submit(resolved, server, working_dir, rehearse=rehearse, retries=retries)
    typer.echo(f"Submitted {job.id}\nWatch it with: rlhf-ray logs {job.id} --follow")
    if follow:
        with _watching(job.id):
            code = submission.follow(server, job, _write)
        raise typer.Exit(code)


@app.command("list", rich_help_panel=PANEL)
def list_runs(address: Address = None, as_json: AsJson = False) -> None:
    """List the runs on a cluster."""
    from rlhf_ray.jobs.connection import connect
    from rlhf_ray.jobs.run_tables import list_table

    jobs = connect(address).jobs()
    if as_json:
        print_json([asdict(job) for job in jobs])
    else:
        _print(list_table(jobs))


@app.command(rich_help_panel=PANEL)
def status(run: RunName, address: Address = None, as_json: AsJson = False) -> None:
    """Show the state of a run: stage, iteration, reward, KL, generators, ETA."""
    from rlhf_ray.jobs.run_handles import find_run
    from rlhf_ray.jobs.run_tables import status_table

    current = find_run(run, address).status()
    if as_json:
        print_json(asdict(current))
    else:
        _print(status_table(current))


@app.command(rich_help_panel=PANEL)
def logs(
    run: RunName,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Keep printing until the run ends.")
    ] = False,
) -> None:
    """Print the output of a run."""
    from rlhf_ray.jobs.run_handles import find_run

    with _watching(run):
        for text in find_run(run, address).logs(follow):
            _write(text)


@app.command(rich_help_panel=PANEL)
def stop(
    run: RunName,
    address: Address = None,
    now: Annotated[
        bool,
        typer.Option("--now", help="Stop at once; the run resumes from its last saved commit."),
    ] = False,
) -> None:
    """Stop a run after the current iteration has been committed and saved.

    A stopped run resumes when it is run or submitted again.
    """
    from rlhf_ray.jobs.run_handles import find_run

    find_run(run, address).stop(now, typer.echo)


@app.command(rich_help_panel=PANEL, epilog="Example: rlhf-ray scale my-run --generators 6")
def scale(
    run: RunName,
    generators: Annotated[int, typer.Option(min=1, help="New number of generators.")],
    address: Address = None,
) -> None:
    """Change the number of generators while a run trains."""
    from rlhf_ray.jobs.run_handles import find_run

    find_run(run, address).scale(generators)
    typer.echo(f"Requested {generators} generators. See them start or stop: rlhf-ray status {run}")


@contextmanager
def _watching(run: str) -> Iterator[None]:
    """Report on Ctrl-C that the run itself continues."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\nThe run continues. Stop it with: rlhf-ray stop {run}")
        raise typer.Exit(0) from None


def _write(text: str) -> None:
    # Progress bars of libraries go back to the start of their line.
    sys.stdout.write(printable(text.replace("\r\n", "\n").replace("\r", "\n")))
    sys.stdout.flush()


def _print(table: "RenderableType") -> None:
    from rich.console import Console

    Console(soft_wrap=not sys.stdout.isatty()).print(table)
