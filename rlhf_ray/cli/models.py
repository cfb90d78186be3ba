"""Commands that use a run's models."""

import shlex
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from rlhf_ray.cli.arguments import (
    AsJson,
    ManyModels,
    MaxTokens,
    Overrides,
    RunVersions,
    Temperature,
    policies_at,
    print_json,
    read_config,
    split_versions,
)
from rlhf_ray.secrecy import printable

app = typer.Typer()

USE = "Use the models"


@app.command(rich_help_panel=USE, epilog="Example: rlhf-ray generate runs/quickstart@5,latest")
def generate(
    config: RunVersions,
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
    """Show the answers of a run's models to the same prompts, side by side.

    RUN@100,200,latest shows versions of its policy, which share their base in memory.
    """
    from rlhf_ray.serving import generate as generate_stage

    run, versions = split_versions(config)
    rows = generate_stage.run(
        read_config(run, overrides),
        models=[*policies_at(versions), *(model or [])],
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


@app.command(rich_help_panel=USE, epilog="Example: rlhf-ray chat runs/quickstart@5,latest")
def chat(
    config: RunVersions,
    overrides: Overrides = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="sft, dpo, ppo, ppo@best, ppo@7 or a path to a language model; may be repeated. "
            "Default: ppo."
        ),
    ] = None,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
    page: Annotated[
        bool,
        typer.Option(
            "--page",
            help="Ask in a web page on this machine, with a slider over the kept versions.",
        ),
    ] = False,
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="Port of the page, on loopback. Default: a free one."),
    ] = 0,
) -> None:
    """Chat with a run's models in the terminal, with several of them side by side.

    RUN@100,200,latest are versions of its policy, which share their base in memory.
    """
    run, versions = split_versions(config)
    resolved = read_config(run, overrides)
    models = [*policies_at(versions), *(model or [])]
    if page:
        from rlhf_ray.serving.versions import Versions
        from rlhf_ray.web.server import serve as serve_pages
        from rlhf_ray.web.versions import VersionPages

        answers = Versions(resolved, models, temperature=temperature, max_tokens=max_tokens)
        serve_pages(VersionPages(resolved.run.name, answers).routes(), port, typer.echo)
        return
    from rlhf_ray.serving.chat import run as run_chat

    def write(text: str) -> None:
        typer.echo(printable(text), nl=False)
        sys.stdout.flush()

    run_chat(
        resolved,
        _typed_lines(),
        write,
        models=models or ["ppo"],
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
    config: RunVersions,
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
    """Serve a run's models, or RUN@100,latest, through vLLM's OpenAI-compatible server."""
    from rlhf_ray.serving import serve as serve_stage

    run, versions = split_versions(config)
    models = [*policies_at(versions), *(model or [])]
    arguments = serve_stage.command(read_config(run, overrides), models, further or [])
    if warning := serve_stage.exposure_warning(further or []):
        typer.echo(f"Warning: {warning}", err=True)
    typer.echo(shlex.join(arguments))
    if not print_only:
        serve_stage.run(arguments)
