"""Commands that talk with a run's models."""

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from rlhf_ray.cli.arguments import (
    ConfigPath,
    ManyModels,
    MaxTokens,
    OneModel,
    Overrides,
    Temperature,
    read_config,
)

app = typer.Typer()


@app.command()
def generate(
    config: ConfigPath,
    overrides: Overrides = None,
    model: ManyModels = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What a user says; repeatable. Default: held-out prompts."),
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="How many held-out prompts.")] = 4,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")] = False,
) -> None:
    """Sample the run's language models on the same prompts, side by side."""
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
        import json

        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    Console().print(generate_stage.table(rows))


@app.command()
def chat(
    config: ConfigPath,
    overrides: Overrides = None,
    model: OneModel = "ppo",
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
) -> None:
    """Talk with one of the run's language models in the terminal."""
    from rlhf_ray.serving.chat import run as run_chat

    def write(text: str) -> None:
        typer.echo(text, nl=False)
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
    """Lines as they are typed, with editing and history on a terminal; ends with the input."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (makes input() edit and remember)
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


@app.command()
def serve(
    config: ConfigPath,
    overrides: Overrides = None,
    model: ManyModels = None,
    further: Annotated[
        list[str] | None,
        typer.Option("--vllm", help="Further argument of vllm serve, e.g. --vllm=--port=8001."),
    ] = None,
    print_only: Annotated[
        bool, typer.Option("--print-only", help="Print the command; do not run it.")
    ] = False,
) -> None:
    """Serve the run's language models through vLLM's OpenAI-compatible server."""
    from rlhf_ray.serving import serve as serve_stage

    arguments = serve_stage.command(read_config(config, overrides), model or [], further or [])
    if warning := serve_stage.exposure_warning(further or []):
        typer.echo(f"Warning: {warning}", err=True)
    typer.echo(serve_stage.shell_command(arguments))
    if not print_only:
        serve_stage.run(arguments)
