"""Readers of files, folders and datasets on the hub; each yields one row at a time."""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import datasets
import pyarrow as pa
from huggingface_hub import HfApi
from pyarrow import csv, parquet

from rlhf_ray.config.data import DataSource
from rlhf_ray.errors import DataError
from rlhf_ray.people.preferences import holds_preferences, training_rows

RawRow = dict[str, object]
"""A row as its file has it: columns not renamed yet."""

_HUB_NAME = re.compile(r"(?:([\w.-]+)/)?\w[\w.-]*")
"""Name of a dataset on the hub; the oldest have no owner."""

_CHUNK = 2**20
"""Characters read at once from a JSON list."""
_LONGEST_WORD = len("-Infinity")
"""Longest JSON word or sign that may be cut off at the end of a chunk."""

_SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}\b")
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-z])")

_BROKEN = (pa.ArrowException, zlib.error, ValueError, OSError)
"""What libraries raise on files that they cannot read."""

_METADATA_FILES = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
"""JSON files that `datasets` writes beside the rows and that hold none."""


def read_rows(source: DataSource, text_column: str = "text") -> Iterator[RawRow]:
    """Read the rows of a source as they are, a few at a time.

    A path that does not exist is taken as a name on the hub if it can be one. ``text_column`` is
    that of a text that stands in the config as a row.

    Raises:
        DataError: there is nothing to read, or a row is broken.
    """
    if source.path is None:
        return ({text_column: row} if isinstance(row, str) else row for row in source.rows or ())
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _read_folder(path, source.split)
    if path.exists():
        return _read_file(path)
    name = _HUB_NAME.fullmatch(source.path)
    # data/pairs is a misspelt file, not a dataset of the owner data, if the folder data exists.
    if name and not (name[1] and path.parent.is_dir()) and not _suffix(path):
        return _read_hub(source.path, source)
    raise DataError(
        f"{path} does not exist (looked for in {Path.cwd()}); correct the dataset's path"
    )


def _suffix(path: Path) -> str:
    """Return the suffix that selects a reader, .gz left out; empty if there is none."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in _READERS if name.endswith(suffix)), "")


def _read_file(path: Path) -> Iterator[RawRow]:
    reader = _READERS.get(_suffix(path))
    if reader is None:
        raise DataError(
            f"{path}: cannot read {path.suffix or 'a file without a suffix'}; convert it to "
            f"{', '.join(_READERS)} (all but parquet also as .gz), or to a folder saved by datasets"
        )
    try:
        for index, row in enumerate(reader(path)):
            if not isinstance(row, dict):
                raise ValueError(f"row {index} is {type(row).__name__}, expected an object {{...}}")
            yield row
    except (*_BROKEN, TypeError, EOFError, RecursionError) as error:
        raise DataError(
            f"Cannot read {path} as {_suffix(path)[1:]}: {error}. Correct or replace the file"
        ) from error


def _read_folder(path: Path, split: str) -> Iterator[RawRow]:
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        yield from _read_saved(path, split)
        return
    files = sorted(item for item in path.rglob("*") if item.is_file() and _holds_rows(item))
    if not files:
        raise DataError(
            f"{path} is a folder, but not one that datasets' save_to_disk wrote, and it holds no "
            f"{', '.join(_READERS)} file; correct the dataset's path"
        )
    for file in _of_split(path, files, split):
        yield from _read_file(file)


def _holds_rows(path: Path) -> bool:
    return bool(_suffix(path)) and path.name not in _METADATA_FILES


def _of_split(folder: Path, files: Sequence[Path], split: str) -> Sequence[Path]:
    """Return the files named after a split, or in a folder named so; all if no name has a split."""
    splits = {file: _split_name(file.relative_to(folder)) for file in files}
    named = sorted({name for name in splits.values() if name})
    if not named:
        return files
    if split not in named:
        raise DataError(
            f"{folder} has no split {split} by the names of its files; set split to one of "
            f"its splits: {', '.join(named)}"
        )
    return [file for file in files if splits[file] == split]


def _split_name(file: Path) -> str | None:
    """Return the split that a file is named after.

    Example:
        >>> _split_name(Path("data/train_sft-00000-of-00002.parquet"))
        'train_sft'
        >>> _split_name(Path("test/rows.jsonl"))
        'test'
    """
    matches = (_SHARD.match(name) or _SPLIT.match(name) for name in reversed(file.parts))
    return next((match[1] for match in matches if match), None)


def _read_saved(path: Path, split: str) -> Iterator[RawRow]:
    try:
        loaded = datasets.load_from_disk(str(path))
    except _BROKEN as error:
        raise DataError(f"{path}: cannot be loaded by datasets ({error}); save it again") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            splits = ", ".join(map(str, loaded))
            raise DataError(
                f"{path} has no split {split}; set split to one of its splits: {splits}"
            )
        loaded = loaded[split]
    yield from loaded  # type: ignore[misc]  (rows of a Dataset are mappings)


def _read_hub(path: str, source: DataSource) -> Iterator[RawRow]:
    try:
        HfApi().dataset_info(path, timeout=20)
        rows = datasets.load_dataset(
            path,
            source.name,
            data_dir=source.data_dir,
            split=source.split,
            streaming=True,
        )
        yield from rows  # type: ignore[misc]  (rows of a streamed split are mappings)
    except Exception as error:  # the hub's HTTP client raises errors of its own
        first, *_ = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"Dataset {path!r} (name {source.name}, split {source.split}) is no file here "
            f"and cannot be loaded from the hub: {first}. Check its name, its split, the network "
            "and your access, or give the path of a file"
        ) from error


def _read_json(path: Path) -> Iterator[object]:
    """Read a list of objects, one object a line, or the rows that follow from people's verdicts."""
    if path.suffix == ".jsonl" and holds_preferences(path):
        yield from training_rows(path)
        return
    with _open_text(path) as file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
        if first == "[":
            yield from _list_items(file)
            return
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _parse_line(number, line)


def _open_text(path: Path) -> IO[str]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _parse_line(number: int, line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} is not JSON ({error})") from None


def _list_items(file: IO[str]) -> Iterator[object]:
    """Yield the items of a JSON list whose bracket has been read, holding little more than one."""
    decoder = json.JSONDecoder()
    buffer = ""
    start = number = 0
    while True:
        while start < len(buffer) and buffer[start] in " \t\r\n,":
            start += 1
        if buffer.startswith("]", start):
            return
        try:
            item, start = decoder.raw_decode(buffer, start)
        except json.JSONDecodeError as error:
            rest = buffer[start:]
            more = file.read(max(_CHUNK, len(rest))) if _may_be_cut_off(error) else ""
            if not more:
                raise ValueError(f"item {number} is not JSON or is cut off ({error})") from None
            buffer, start = rest + more, 0
            continue
        yield item
        number += 1


def _may_be_cut_off(error: json.JSONDecodeError) -> bool:
    """True if reading on may help: the text ends in a string, a word or a number."""
    is_at_end = error.pos >= len(error.doc) - _LONGEST_WORD
    return is_at_end or error.msg.startswith("Unterminated string")


def _read_parquet(path: Path) -> Iterator[RawRow]:
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1000):
            yield from batch.to_pylist()


def _read_csv(path: Path) -> Iterator[RawRow]:
    """Read every cell as text, or as None where it is empty.

    A type guessed from the first cells would turn answers into numbers ("007" into 7), and fail on
    later cells that do not fit.
    """
    parse = csv.ParseOptions(newlines_in_values=True)
    with pa.input_stream(str(path)) as stream, csv.open_csv(stream, parse_options=parse) as file:
        names = file.schema.names
    cells = csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()), null_values=[""], strings_can_be_null=True
    )
    with (
        pa.input_stream(str(path)) as stream,
        csv.open_csv(stream, parse_options=parse, convert_options=cells) as file,
    ):
        for batch in file:
            yield from batch.to_pylist()


_READERS: dict[str, Callable[[Path], Iterator[object]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
