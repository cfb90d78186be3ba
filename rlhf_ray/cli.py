"""The command line: ``rlhf-ray COMMAND CONFIG [key=value ...]``. Imports heavy things late."""

import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.config import Config, load
from rlhf_ray.errors import ConfigError, RlhfError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train language models with human feedback on a Ray cluster.\n\n"
    "Every command takes a CONFIG (a YAML file, or the folder of a run) and overrides such as "
    "ppo.iterations=20.",
)

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file, or the folder of a run.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Dotted keys on top, e.g. run.seed=1."),
]

OneModel = Annotated[
    str,
    typer.Option(help="sft, dpo, ppo (ppo@best, ppo@7: other commits), reward, or a path."),
]
ManyModels = Annotated[
    list[str] | None,
    typer.Option(
        "--model", help="sft, dpo, ppo (ppo@best, ppo@7), or a path; repeatable. Default: all."
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(min=0.0, help="0: the likeliest token. Default: rollout.temperature."),
]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Longest answer. Default: rollout.max_tokens.")
]


def read_config(path: Path, overrides: list[str] | None) -> Config:
    """The config that a command was given.

    Raises:
        ConfigError: see `rlhf_ray.config.load`.
    """
    if path.is_dir():
        path = path / "config.yaml"
        if not path.is_file():
            raise ConfigError(f"{path.parent} is no run: it has no config.yaml; name a YAML file")
    return load(path, overrides or [])


@app.command()
def run(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run the whole pipeline; goes on where an earlier run of the same name stopped."""
    from rlhf_ray.stages.pipeline import run as run_pipeline

    resolved = read_config(config, overrides)
    folder = run_pipeline(resolved)
    if "report" in resolved.run.stages:
        typer.echo(f"Report: {folder / 'report.html'}")


def _stage_command(stage: str) -> Callable[..., None]:
    def command(config: ConfigPath, overrides: Overrides = None) -> None:
        from rlhf_ray.stages.pipeline import run_single

        typer.echo(f"Wrote {run_single(read_config(config, overrides), stage) / stage}")

    return command


for _stage, _help in {
    "prepare": "Turn a Stack Exchange dump into disjoint sets.",
    "pretrain": "Train a causal language model on packed text.",
    "sft": "Fine-tune on questions and answers, with LoRA, then merge.",
    "reward": "Train the pairwise reward model.",
    "dpo": "Train the policy on pairs directly, without a reward model.",
    "ppo": "Train the policy by PPO; goes on from its last commit.",
    "evaluate": "Compare SFT and PPO on held-out questions.",
}.items():
    app.command(_stage, help=_help)(_stage_command(_stage))


@app.command()
def merge(config: ConfigPath, overrides: Overrides = None, model: OneModel = "ppo") -> None:
    """Merge one of the run's adapters into its base."""
    from rlhf_ray.stages.merge import run as run_merge

    resolved = read_config(config, overrides)
    summary = run_merge(resolved, model)
    typer.echo(f"Wrote {summary['model']}; {_survived(resolved, summary['survived'])}")


class ExportKind(StrEnum):
    """What of a model is exported."""

    ADAPTER = "adapter"
    MERGED = "merged"


@app.command()
def export(
    config: ConfigPath,
    overrides: Overrides = None,
    model: OneModel = "ppo",
    kind: Annotated[
        ExportKind, typer.Option(help="The adapter alone, or a whole model.")
    ] = ExportKind.ADAPTER,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; default export/ in the run's folder.")
    ] = None,
) -> None:
    """Write a model for other tools, with a card that says where it comes from."""
    from rlhf_ray.stages.export import run as run_export

    resolved = read_config(config, overrides)
    summary = run_export(resolved, model=model, kind=kind.value, out=out)
    survived = summary["survived"]
    note = "" if survived is None else f"; {_survived(resolved, survived)}"
    typer.echo(f"Wrote {summary['folder']}{note}")


def _survived(config: Config, share: float) -> str:
    return f"{share:.2%} of the weights that it changes kept a change in {config.model.dtype}"


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
    from rlhf_ray.stages import generate as generate_stage

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
    from rlhf_ray.stages.chat import run as run_chat

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
    from rlhf_ray.stages import serve as serve_stage

    arguments = serve_stage.command(read_config(config, overrides), model or [], further or [])
    typer.echo(serve_stage.printed(arguments))
    if not print_only:
        serve_stage.run(arguments)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not tables.")] = False,
) -> None:
    """Resolve and validate a config; print what would run where, and how large its models are."""
    from rlhf_ray.stages import plan as planning

    resolved = read_config(config, overrides)
    if as_json:
        import json

        typer.echo(json.dumps(planning.as_json(resolved), indent=2))
    else:
        typer.echo(planning.describe(resolved))


@app.command()
def report(config: ConfigPath, overrides: Overrides = None) -> None:
    """Draw the HTML report of a run again."""
    from rlhf_ray.observability.report import build

    typer.echo(f"Report: {build(Path(read_config(config, overrides).run.dir))}")


@app.command()
def doctor() -> None:
    """Check this machine, and say what to fix."""
    from rlhf_ray import preflight

    raise typer.Exit(preflight.main(["--installed"]))


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
