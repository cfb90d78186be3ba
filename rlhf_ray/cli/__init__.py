"""The command line: ``rlhf-ray COMMAND CONFIG [key=value ...]``.

One module per group of commands; the groups are the panels of ``rlhf-ray --help``. Commands import
what they run when they run, so that help answers at once. May import every room; read
`training` first.
"""

import sys
import traceback
from importlib.util import find_spec
from types import TracebackType
from typing import Annotated

import typer

from rlhf_ray import interruption
from rlhf_ray.cli import inspection, jobs, models, training
from rlhf_ray.errors import ConfigError, RlhfError
from rlhf_ray.secrecy import printable, redacted
from rlhf_ray.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    # Its tracebacks print local variables, which may hold credentials.
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _commands in (training, inspection, jobs, models):
    app.add_typer(_commands.app)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"rlhf-ray {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Train language models with reinforcement learning from human feedback, on a Ray cluster.

    Most commands take a CONFIG (a YAML file, @NAME for a shipped config, or a run's folder) and any
    number of overrides such as ppo.iterations=20. Commands that watch or change a run on a cluster
    take the run's name, its folder or its submission id.

    [bold]Examples[/bold]

    rlhf-ray run configs/quickstart.yaml ppo.iterations=20

    rlhf-ray plan configs/stackllama/ppo_3x8_a100.yaml --cluster 3x8xA100-80GB

    rlhf-ray chat runs/quickstart
    """


def main() -> None:
    """Run the command line; an `RlhfError` becomes one message and its exit code.

    After SIGTERM the exit code is 143, after Ctrl-C 130, whatever they made fail.
    """
    from rlhf_ray.observability.quiet import silence_dependencies

    silence_dependencies()
    sys.excepthook = _print_fault
    with interruption.handled():
        code = _run()
        if code and (interrupted := interruption.exit_code()) is not None:
            typer.echo(interruption.explanation(), err=True)
            code = interrupted
    sys.exit(code)


def _run() -> int:
    """Run the command; returns its exit code."""
    try:
        app(prog_name="rlhf-ray")
    except RlhfError as error:
        typer.echo(f"Error: {printable(str(error))}", err=True)
        return error.exit_code
    except ModuleNotFoundError as missing:
        if not _is_client():
            raise
        typer.echo(f"Error: {_needs_more(missing)}", err=True)
        return ConfigError.exit_code
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as fault:
        if interruption.exit_code() is None:
            raise
        _print_fault(type(fault), fault, fault.__traceback__)
        return 1
    return 0


def _is_client() -> bool:
    """Return whether this installation is a client's: without the extra that runs need."""
    return find_spec("torch") is None


def _needs_more(missing: ModuleNotFoundError) -> str:
    package = (missing.name or "").partition(".")[0]
    return (
        f"This command needs {package}, and what is installed here is the client alone: it plans, "
        "submits and watches runs. Install the rest with pip install 'rlhf-ray[gpu]' (without an "
        "NVIDIA GPU 'rlhf-ray[cpu]'), or use scripts/setup.sh of a checkout; runs on a cluster "
        "are started by rlhf-ray submit"
    )


def _print_fault(kind: type[BaseException], fault: BaseException, at: TracebackType | None) -> None:
    """Print the traceback of an error that is not ours, without what no message may show."""
    lines = "".join(traceback.format_exception(kind, fault, at))
    typer.echo(printable(redacted(lines)), err=True, nl=False)
