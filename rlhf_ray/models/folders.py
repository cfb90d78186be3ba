"""Resolve a model path: a model folder, a PEFT folder, or a name on the model hub.

A PEFT folder names its base twice: in ``adapter_config.json`` by absolute path or hub name, as
peft itself wants it, and in ``base_model.json`` relative to the folder, so that a run's folder
still loads after it was moved or copied.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from rlhf_ray.disk import DAMAGE
from rlhf_ray.errors import DataError

ADAPTER_CONFIG = "adapter_config.json"
BASE_MODEL = "base_model.json"

LONGEST_NAME = 200
"""Characters of a name on the hub, which has at most 96 on each side of its slash."""
MAX_PARTS = 10_000
"""Most layers, experts of a layer, or labels; the largest models have some hundreds."""
_PARTS = re.compile(r"(layers?|blocks?|experts?|labels?|depths?)$")


def locate(path: str) -> str:
    """Return the path of an existing model folder, or the name of a model on the hub.

    Raises:
        DataError: the folder does not exist or holds no model, or the hub has no such model.
    """
    folder = Path(path).expanduser()
    # os.path says no where Path raises: for a name that is too long, or holds NUL.
    if os.path.isdir(folder):
        if not any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
            raise DataError(
                f"{folder} is not a model folder: it has neither config.json nor {ADAPTER_CONFIG}"
            )
        refuse_endless(folder)
        return str(folder)
    if os.path.exists(folder):
        raise DataError(f"{folder} is a file; a model is the folder that holds it")
    nested = len(folder.parts) > 2 or (len(folder.parts) == 2 and os.path.isdir(folder.parent))
    nested = nested or len(path) > LONGEST_NAME
    if folder.is_absolute() or path.startswith((".", "~")) or nested:
        raise DataError(
            f"Model folder {path[:200]} does not exist; check model.path, sft.path, reward.path or "
            "critic.path, or run the stage that writes it"
        )
    _require_on_hub(path)
    return path


def refuse_endless(folder: str | Path) -> None:
    """Refuse a config.json with so many parts that building the model would not end.

    Even on the meta device each layer, expert and label is an object.

    Raises:
        DataError: naming the key and its number.
    """
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # the loader names what is wrong with it
    for key, count in _counts(config):
        if count > MAX_PARTS:
            raise DataError(
                f"{folder}: {key} is {count} in config.json, more than the {MAX_PARTS} parts that "
                "a model can have; correct it, or name another model"
            )


def _counts(config: object) -> Iterator[tuple[str, int]]:
    """Yield the numbers of layers, experts and labels in a config, at any depth."""
    parts = config.items() if isinstance(config, dict) else ()
    for key, value in parts:
        if isinstance(value, int) and _PARTS.search(key):
            yield key, value
        yield from _counts(value)


def _require_on_hub(name: str) -> None:
    """Fail at once if a model is unavailable; the libraries would retry for minutes."""
    files = ("config.json", ADAPTER_CONFIG)
    if any(cached_file(name, file) for file in files):
        return
    try:
        HfApi().model_info(name, timeout=20)
    except Exception as error:  # also errors of its HTTP client, which differs between versions
        raise DataError(
            f"Model {name!r} is no folder here and cannot be fetched from the model hub "
            f"({first_line(error)}); check the name, the network and your access, or name a folder"
        ) from error


def cached_file(name: str, file: str) -> str | None:
    """Return a file of a model of the hub that is cached here; None too if there can be no such."""
    try:
        found = try_to_load_from_cache(name, file)
    except HFValidationError:  # a name with a space, for example
        return None
    return found if isinstance(found, str) else None


def is_adapter(path: str) -> bool:
    """Return whether ``path`` is a PEFT folder."""
    return os.path.isfile(Path(path) / ADAPTER_CONFIG)


def require_whole(model: str, stage: str) -> None:
    """Refuse an adapter as the model that a stage trains on."""
    if is_adapter(model):
        raise DataError(
            f"{model} is an adapter; the stage {stage} trains on a whole model: merge it first "
            "(command merge)"
        )


def adapter_task(folder: str) -> str | None:
    """Return the task type in a PEFT folder's config, such as CAUSAL_LM or SEQ_CLS."""
    return _read_json(Path(folder) / ADAPTER_CONFIG).get("task_type")


def adapter_rank(folder: str) -> int:
    """Return the rank of a PEFT folder's adapter; the highest if modules have different ones."""
    adapter_weights(folder)
    file = Path(folder) / ADAPTER_CONFIG
    settings = _read_json(file)
    try:
        return max([int(settings["r"]), *map(int, (settings.get("rank_pattern") or {}).values())])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{file} names no rank that can be read (r, rank_pattern)") from error


def adapter_weights(folder: str | Path) -> Path:
    """Return the file of a PEFT folder's weights.

    Raises:
        DataError: it has none in safetensors; a pickle, which can run code, is never opened.
    """
    file = Path(folder) / "adapter_model.safetensors"
    if not file.is_file():
        raise DataError(
            f"{folder} cannot be loaded: it has no {file.name}; save the adapter with safetensors"
        )
    return file


def base_of(folder: str) -> str:
    """Return the base that a PEFT folder names: an existing folder, or a hub name.

    Looks relative to the folder first (``base_model.json``), then at the path in
    ``adapter_config.json``, taken as it is or relative to the folder.

    Raises:
        DataError: it names none, or one that stands on the folder itself.
    """
    base = deeper = _named_base(folder)
    seen = {Path(folder).resolve()}
    while is_adapter(deeper):
        if Path(deeper).resolve() in seen:
            raise DataError(
                f"{folder} is an adapter that stands on itself: the bases that it names lead back "
                f"to {deeper}; correct base_model_name_or_path in its {ADAPTER_CONFIG}, or remove "
                f"its {BASE_MODEL}"
            )
        seen.add(Path(deeper).resolve())
        deeper = _named_base(deeper)
    return base


def _named_base(folder: str) -> str:
    here = Path(folder)
    recorded = str(_read_json(here / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    candidates = [Path(recorded), here / recorded] if recorded else []
    if (here / BASE_MODEL).is_file():
        candidates.insert(0, here / str(_read_json(here / BASE_MODEL).get("path")))
    for candidate in candidates:
        if candidate.is_dir():
            return str(candidate.resolve())
    if not recorded:
        raise DataError(f"{here / ADAPTER_CONFIG} names no base_model_name_or_path; add it")
    return recorded


def safetensors_files(model: str) -> list[Path]:
    """Return the safetensors files of a local folder or of a cached hub model.

    Raises:
        DataError: there are none.
    """
    folder = Path(model)
    if not folder.is_dir():
        folder = Path(snapshot_download(model, local_files_only=True))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(f"{model} holds no *.safetensors file; save the model with safetensors")
    return files


def record_base(folder: Path, base: str) -> None:
    """Write the path of a PEFT folder's base, relative to the folder, to ``base_model.json``."""
    (folder / BASE_MODEL).write_text(relative_base(folder, base), encoding="utf-8")


def relative_base(folder: Path, base: str) -> str:
    """Return what `record_base` writes."""
    relative = os.path.relpath(Path(base).resolve(), folder.resolve())
    return json.dumps({"path": Path(relative).as_posix()}) + "\n"


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}
    except (*DAMAGE, OSError) as error:
        raise DataError(f"{path} is not readable JSON: {error}") from error
