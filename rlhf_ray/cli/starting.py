"""The command ``init``: a config to start from, copied or made of a few answers."""

import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from rlhf_ray.config import shipped
from rlhf_ray.errors import ConfigError, PlacementError, RlhfError
from rlhf_ray.secrecy import printable

if TYPE_CHECKING:
    from rlhf_ray.cli.answers import Answers, Kind

T = TypeVar("T")

ModelAnswer = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Folder or hub name of the model to train; 'tiny': a small one is made.",
    ),
]
DataAnswer = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH",
        help="File, folder or hub name of a dataset; its first row says what it is for. PATH=KIND "
        "says so of one on the hub: preferences, demonstrations or prompts. May be repeated. "
        "'synthetic': a made-up Stack Exchange site.",
    ),
]
RewardAnswer = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Finished reward model, or file.py:name of a function, in place of one that learns "
        "from preferences.",
    ),
]
GpusAnswer = Annotated[
    str | None,
    typer.Option(
        metavar="NODESxGPUSxKIND",
        help="GPUs, as plan's --cluster: 1xA100-80GB, 3x8xA100-80GB; or none. Default: this "
        "machine's.",
    ),
]


def init(
    name: Annotated[
        str | None, typer.Argument(help="Shipped config to copy, such as quickstart.")
    ] = None,
    model: ModelAnswer = None,
    data: DataAnswer = None,
    gpus: GpusAnswer = None,
    reward: RewardAnswer = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write. Default: the config's name, here.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write a config to start from: of your model, data and GPUs, or a copy of a shipped one.

    On a terminal it asks for what no option says; Enter takes the default. The config has been
    checked by plan, with the layout that plan --optimize finds where there are several GPUs.
    """
    from rlhf_ray.cli.answers import Answers

    given = [option for option in (model, data, gpus, reward) if option]
    if name is not None and given:
        raise ConfigError(
            f"{name} is copied as it is; leave it out to make a config of --model, --data and "
            "--gpus, or leave those out"
        )
    asks = is_terminal()
    if name is not None or not (given or asks):
        _copy(name or "quickstart", out, force)
        return
    if out is not None:
        _refuse_existing(out, force)
    named = _model(model, asks)
    datasets = _datasets(data, asks)
    answers = Answers(named, datasets, _reward(reward, datasets, asks), _gpus(gpus, asks))
    path = out or _path(Path(f"{_name(answers)}.yaml"), asks, force)
    _write_fitted(answers, path, force, asks and gpus is None)


def _write_fitted(answers: "Answers", path: Path, force: bool, asks: bool) -> None:
    """Write the config with a layout that fits the GPUs; ask for others where none does."""
    from rlhf_ray.cli import first_config

    while True:
        try:
            draft, plan = first_config.fitted(first_config.compose(answers, path.stem), answers)
            break
        except PlacementError as error:
            if not asks:
                raise
            typer.echo(f"  {printable(str(error))}", err=True)
            answers = replace(answers, gpus=_gpus(None, asks))
    _write(path, draft.text(), force)
    where = answers.gpus if answers.nodes else "this machine"
    typer.echo(f"Wrote {path}, which fits on {where}: {', '.join(plan.config.run.stages)}. Next:")
    for command in _next_commands(path, answers):
        typer.echo(f"  {command}")


def _next_commands(path: Path, answers: "Answers") -> Iterator[str]:
    file = shlex.quote(str(path))
    cluster = f" --cluster {answers.gpus}" if answers.nodes else ""
    yield f"rlhf-ray plan {file}{cluster}"
    if len(answers.nodes) > 1:  # only a folder that all nodes see is the run's
        folder = shlex.quote(f"run.dir=/SHARED/{path.stem}")
        yield f"rlhf-ray submit {file} {folder} --address http://HEAD:8265"
        return
    yield f"rlhf-ray doctor {file}"
    yield f"rlhf-ray run {file}"


def is_terminal() -> bool:
    """Return whether a person can answer."""
    return sys.stdin.isatty()


def _copy(name: str, out: Path | None, force: bool) -> None:
    name = name.removeprefix("@")
    text = shipped.copy(name)
    path = out or Path(f"{name.rpartition('/')[2]}.yaml")
    _write(path, text, force)
    file = shlex.quote(str(path))
    typer.echo(f"Wrote {path}. Edit it, then: rlhf-ray plan {file}; rlhf-ray run {file}")


def _write(path: Path, text: str, force: bool) -> None:
    _refuse_existing(path, force)
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}); name another file with --out"
        ) from None


def _refuse_existing(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise ConfigError(f"{path} exists; name another file with --out, or overwrite with --force")


def _model(given: str | None, asks: bool) -> str | None:
    from rlhf_ray.cli.answers import TINY, model_of

    if given is not None or not asks:
        return model_of(_require("--model", given))
    return _ask("Model: a folder, a name on the hub, or tiny", model_of, TINY)


def _datasets(given: Sequence[str] | None, asks: bool) -> "dict[str, Kind]":
    """Return the datasets and what each holds; none: the synthetic site."""
    from rlhf_ray.cli.answers import SYNTHETIC, dataset_of, kind_named

    datasets: dict[str, Kind] = {}
    texts = [*(given or [])]
    if not texts and not asks:
        _require("--data", None)
    question = "Data: a file, a folder, a name on the hub, or synthetic"
    default = SYNTHETIC
    while texts or (asks and not given):
        found = dataset_of(texts.pop(0)) if given else _ask(question, dataset_of, default)
        if found is None:
            break
        path, kind = found
        if kind is None and not asks:
            raise ConfigError(
                f"{path} is not here, so say what it holds: --data {path}=preferences, "
                "=demonstrations or =prompts"
            )
        kind = kind or _ask(f"{path} holds preferences, demonstrations or prompts", kind_named)
        typer.echo(printable(f"  {path}: {kind}"))
        datasets[path] = kind
        question, default = "More data (Enter: no more)", ""
    return datasets


def _reward(given: str | None, datasets: "Mapping[str, Kind]", asks: bool) -> str | None:
    from rlhf_ray.cli.answers import reward_of

    if given is not None:
        return reward_of(given)
    kinds = {*datasets.values()}
    if "prompts" not in kinds or "preferences" in kinds:
        return None
    if asks:
        return _ask("Reward: a reward model's folder or hub name, or file.py:function", reward_of)
    raise ConfigError(
        "Prompts alone do not say which answer is good; give --reward, a reward model or "
        "file.py:function, or add preferences with --data"
    )


def _gpus(given: str | None, asks: bool) -> str:
    from rlhf_ray.cli.answers import gpus_here, gpus_of

    if given is not None:
        return gpus_of(given)
    question = "GPUs: none, or such as 1xA100-80GB, 3x8xA100-80GB"
    return _ask(question, gpus_of, gpus_here()) if asks else gpus_here()


def _path(default: Path, asks: bool, force: bool) -> Path:
    def free(text: str) -> Path:
        _refuse_existing(Path(text), force)
        return Path(text)

    return _ask("File to write", free, str(default)) if asks else default


def _name(answers: "Answers") -> str:
    """Return a name for the run, of its model."""
    from rlhf_ray.cli.answers import TINY

    name = Path(answers.model or TINY).resolve().name.lower()
    return re.sub(r"[^a-z0-9]+", "_", name).strip("_") or "config"


def _require(option: str, value: str | None) -> str:
    if value is None:
        raise ConfigError(
            f"{option} is missing, and there is no terminal to ask; give --model, --data and "
            "--gpus, such as --model Qwen/Qwen2.5-0.5B-Instruct --data pairs.jsonl --gpus "
            "1xA100-80GB"
        )
    return value


def _ask(question: str, read: Callable[[str], T], default: str | None = None) -> T:
    """Ask until the answer can be read; Enter takes the default."""
    while True:
        text = typer.prompt(question, default=default, show_default=bool(default))
        try:
            return read(text.strip())
        except RlhfError as error:
            typer.echo(f"  {printable(str(error))}", err=True)
