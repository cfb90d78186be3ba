"""The command line: ``rlhf-ray COMMAND CONFIG [key=value ...]``. Imports heavy things late."""

import sys

import typer

from rlhf_ray.cli import inspection, models, training
from rlhf_ray.errors import RlhfError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train language models with human feedback on a Ray cluster.\n\n"
    "Every command takes a CONFIG (a YAML file, or the folder of a run) and overrides such as "
    "ppo.iterations=20.",
)
for _commands in (training, models, inspection):
    app.add_typer(_commands.app)


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
