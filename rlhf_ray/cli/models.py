"""Commands that use a run's models."""

import shlex
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from rlhf_ray.cli.arguments import (
    AsJson,
    ConfigPath,
    ManyModels,
    MaxTokens,
    Overrides,
    PolicyModel,
    Temperature,
    print_json,
    read_config,
)
from rlhf_ray.secrecy import printable

app = typer.Typer()

USE = "Use the models"


@app.command(rich_help_panel=USE, epilog="Example: rlhf-ray generate runs/quickstart --num 8")
def generate(
    config: ConfigPath,
    overrides: Overrides = None,
    model: ManyModels = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Prompt to answer; may be repeated. Default: held-out prompts."),
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Number of held-out prompts.")] = 4,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
    as_json: AsJson = False,
) -> None:
    """Show the answers of a run's models to the same prompts, side by side."""
    from rlhf_ray.serving import generate as generate_stage

    rows = generate_stage.run(
        read_config(config, overrides),
        models=model or [],
        prompts=prompt or [],
        num=num,
        temperature=temperature,
        max_tokens=max_tokens,
    )
    if as_json:
        print_json(rows)
        return
    from rich.console import Console

    Console().print(generate_stage.table(rows))


@app.command(rich_help_panel=USE, epilog="Example: rlhf-ray chat runs/quickstart --model ppo@best")
def chat(
    config: ConfigPath,
    overrides: Overrides = None,
    model: PolicyModel = "ppo",
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
) -> None:
    """Chat with one of a run's models in the terminal."""
    from rlhf_ray.serving.chat import run as run_chat

    def write(text: str) -> None:
        typer.echo(printable(text), nl=False)
        sys.stdout.flush()

    run_chat(
        read_config(config, overrides),
        _typed_lines(),
        write,
        model=model,
        temperature=temperature,
        max_tokens=max_tokens,
    )


def _typed_lines() -> Iterator[str]:
    """Yield typed lines until the input ends, with editing and history on a terminal."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives input() line editing and history)
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


@app.command(rich_help_panel=USE, epilog="Example: rlhf-ray serve runs/my-run --model ppo")
def serve(
    config: ConfigPath,
    overrides: Overrides = None,
    model: ManyModels = None,
    further: Annotated[
        list[str] | None,
        typer.Option("--vllm", help="Argument for `vllm serve`, such as --vllm=--port=8001."),
    ] = None,
    print_only: Annotated[
        bool, typer.Option("--print-only", help="Print the command without running it.")
    ] = False,
) -> None:
    """Serve a run's models through vLLM's OpenAI-compatible server."""
    from rlhf_ray.serving import serve as serve_stage

    arguments = serve_stage.command(read_config(config, overrides), model or [], further or [])
    if warning := serve_stage.exposure_warning(further or []):
        typer.echo(f"Warning: {warning}", err=True)
    typer.echo(shlex.join(arguments))
    if not print_only:
        serve_stage.run(arguments)
