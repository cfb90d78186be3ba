"""The command line: ``rlhf-ray COMMAND CONFIG [key=value ...]``. Imports heavy things late."""

import signal
import sys
from types import FrameType

import typer

from rlhf_ray.cli import inspection, jobs, models, training
from rlhf_ray.errors import RlhfError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train language models with human feedback on a Ray cluster.\n\n"
    "Most commands take a CONFIG (a YAML file, or the folder of a run) and overrides such as "
    "ppo.iterations=20; those that watch or change a run take its name, folder or submission id.",
)
for _commands in (training, jobs, models, inspection):
    app.add_typer(_commands.app)

INTERRUPTED = 130
"""Exit code that typer makes of KeyboardInterrupt."""


def main() -> None:
    """Entry point: errors of ours become one message and their exit code."""
    from rlhf_ray.observability.quiet import silence_dependencies

    silence_dependencies()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except RlhfError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            typer.echo("Interrupted; what was committed is kept, and the run can go on", err=True)
        raise


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """SIGTERM ends a command as Ctrl-C does: every part of it cleans up on the way out."""
    raise KeyboardInterrupt
