"""What ``rlhf-ray init`` is answered, and what each answer may be.

Every reader of an answer raises one of the project's errors, as one sentence: on a terminal it is
shown and the question asked again.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from rlhf_ray.config import load, shipped
from rlhf_ray.config.data import DataSource
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.placement.hardware import GPU_KINDS, parse_cluster, this_machine
from rlhf_ray.placement.layout import Node
from rlhf_ray.planning.shapes import models_of

Kind = Literal["preferences", "demonstrations", "prompts"]
"""What a dataset holds: pairs of answers, prompts with an answer to learn, or prompts alone."""

TINY, SYNTHETIC, NO_GPUS = "tiny", "synthetic", "none"
"""Answers that name neither a model nor a dataset nor a cluster."""


@dataclass(frozen=True)
class Answers:
    """What a person wants to train, with what, and where."""

    model: str | None
    """Folder or hub name; None: the tiny model, built by the run."""
    datasets: Mapping[str, Kind]
    """Path or hub name -> what it holds; empty: the synthetic site."""
    reward: str | None = None
    """Folder or hub name of a reward model, or ``file.py:name`` of a function."""
    gpus: str = NO_GPUS
    """As plan's --cluster; ``none``: the CPUs of this machine."""

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The machines with GPUs; empty without."""
        return () if self.gpus == NO_GPUS else parse_cluster(self.gpus)

    def of_kind(self, *kinds: Kind) -> list[str]:
        """Return the datasets of the first of these kinds of which there are any."""
        found = ([p for p, held in self.datasets.items() if held == kind] for kind in kinds)
        return next((paths for paths in found if paths), [])


def preset_of(model: str) -> str | None:
    """Return the shipped config for a model, by its hub name."""
    return next((name for name in _presets() if load(f"@{name}").model.path == model), None)


def model_of(text: str) -> str | None:
    """Return the model that an answer names; None: the tiny one.

    Raises:
        DataError: its size is not known: it is neither a folder here, nor in the hub's cache, nor
            a shipped config's.
    """
    if text == TINY:
        return None
    model = str(Path(text).expanduser()) if text.startswith("~") else text
    if preset_of(model) is not None:
        return model
    try:
        models_of(load(None, [f"model.path={json.dumps(model)}"]))
    except DataError as error:
        if Path(model, "config.json").is_file():
            raise
        presets = {load(f"@{name}").model.path or "" for name in _presets()}
        raise DataError(
            f"{text} is no model folder here, and a model on the hub must be downloaded first (hf "
            f"download {text}), except {', '.join(sorted(presets))}"
        ) from error
    return model


def _presets() -> list[str]:
    return [name for name in shipped.names() if name.startswith("models/")]


def dataset_of(text: str) -> tuple[str, Kind | None] | None:
    """Return a dataset's path and what it holds, from ``PATH`` or ``PATH=KIND``.

    None stands for the synthetic site, and no kind for a dataset that is not here.

    Raises:
        ConfigError: there is no such kind.
        DataError: it cannot be read, is empty, or its columns are not known.
    """
    if text in (SYNTHETIC, ""):
        return None
    path, mark, kind = text.rpartition("=")
    here = Path(text).expanduser()
    if mark and not here.exists():
        return path, kind_named(kind)
    path = text
    looks_local = here.suffix or path.startswith((".", "/", "~")) or path.count("/") > 1
    if not here.exists() and looks_local:
        raise DataError(f"{path} does not exist (looked for in {Path.cwd()}); correct the path")
    return path, _kind_here(path) if here.exists() else None


def kind_named(text: str) -> Kind:
    """Return the kind of data with a name."""
    for kind in get_args(Kind):
        if text == kind:
            return kind
    raise ConfigError(f"{text!r} is none of {', '.join(get_args(Kind))}; give one of them")


def _kind_here(path: str) -> Kind:
    """Return what a dataset here holds, by the columns of its first row."""
    from rlhf_ray.data.reading.formats import ReadOptions, detect_format
    from rlhf_ray.data.reading.readers import read_rows

    row = next(iter(read_rows(DataSource(path=path))), None)
    if row is None:
        raise DataError(f"{path} has no rows; name another file")
    with suppress(DataError):
        detect_format([*row], "auto", ReadOptions(path, "preferences", 1, 0))
        return "preferences"
    form = detect_format([*row], "auto", ReadOptions(path, "sft", 1, 0))
    if form == "prompt_completion" and "completion" not in row:
        return "prompts"
    return "demonstrations"


def is_function(reward: str) -> bool:
    """Return whether a reward is ``file.py:name`` or ``module:name``, not a model."""
    return ":" in reward and not Path(reward).exists()


def reward_of(text: str) -> str:
    """Return the reward that an answer names.

    Raises:
        DataError: there is no such file.
    """
    file = Path(text.rpartition(":")[0] if is_function(text) else text)
    if (
        file.suffix == ".py" or text.startswith((".", "/", "~"))
    ) and not file.expanduser().exists():
        raise DataError(f"{file} does not exist (looked for in {Path.cwd()}); correct the path")
    if file.suffix == ".py" and not is_function(text):
        raise ConfigError(f"{text} names no function; write {text}:NAME")
    return text


def gpus_of(text: str) -> str:
    """Return the description of a cluster, checked.

    Raises:
        ConfigError: it is malformed.
    """
    if text != NO_GPUS:
        parse_cluster(text)
    return text


def gpus_here() -> str:
    """Return the description of this machine's GPUs; none where their kind is not known."""
    node = this_machine()
    return f"{node.gpus}x{node.gpu_kind}" if node.gpus and node.gpu_kind in GPU_KINDS else NO_GPUS
