"""Destinations of metrics: JSON lines, TensorBoard, and several of them at once."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rlhf_ray.disk import AppendedFile, may_pass, write_atomically
from rlhf_ray.observability.metrics import check


class Sink(Protocol):
    """A destination of metrics."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step."""
        ...

    def close(self) -> None:
        """Close files and connections."""
        ...


class JsonlSink:
    """Appends a JSON object per line and flushes it, so that readers see it at once.

    Also for sample texts: `append` takes any record, such as a completion
    ``{iteration, prompt, response, score, kl, length, finish_reason}``.

    Args:
        path: file to append to; it and its folder are created with the first record.
        step_key: the key under which `log` writes the step.
    """

    def __init__(self, path: str | Path, step_key: str = "iteration") -> None:
        self._path = Path(path)
        self._step_key = step_key
        self._file: AppendedFile | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append ``{step_key: step, **metrics}``."""
        self.append({self._step_key: step, **metrics})

    def append(self, record: Mapping[str, object]) -> None:
        """Append a record; non-finite numbers, which JSON lacks, become null."""
        line = json.dumps(finite(record), ensure_ascii=False, allow_nan=False) + "\n"
        if self._file is None:
            self._file = AppendedFile(self._path)
            # A torn last line is ended first, so that this one is whole.
            line = "\n" * _is_torn(self._path) + line
        self._file.write(line)

    def sync(self) -> None:
        """Make the records so far durable."""
        if self._file is not None:
            self._file.sync()

    def flush(self) -> None:
        """Write the records that a full disk has refused; raises OSError if it still does."""
        if self._file is not None:
            self._file.flush()

    def records(self) -> list[dict[str, Any]]:
        """Return the records so far, without lines torn by a kill."""
        return read_jsonl(self._path)

    def truncate_after(self, key: str, value: float) -> None:
        """Drop the records with ``record[key] > value``, as a resumed run does.

        Records without ``key`` stay; torn lines are dropped. The file is replaced atomically.
        """
        self.close()
        if not self._path.exists():
            return
        kept = [record for record in self.records() if record.get(key, value) <= value]
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in kept]
        write_atomically(self._path, "".join(lines))

    def close(self) -> None:
        """Close the file; a later `append` reopens it."""
        if self._file is not None:
            self._file.close()
            self._file = None


class TensorBoardSink:
    """Writes scalars for TensorBoard, which hides those of earlier processes from purge_step on.

    A full disk leaves a gap in its curves.
    """

    def __init__(self, folder: str | Path, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open = partial(SummaryWriter, str(folder))
        self._writer: SummaryWriter | None = self._open(purge_step=purge_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write each metric as a scalar at ``step``."""
        try:
            self._writer = self._writer or self._open()
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
        except OSError as error:
            if not may_pass(error):
                raise
            self._writer = None  # its thread has ended, and closing it would wait for that

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()


class Sinks:
    """Logs to several sinks in order, and refuses metrics that are not registered."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one step to every sink.

        Raises:
            KeyError: a name is not in the registry of metrics; nothing has been logged.
        """
        check(metrics)
        for sink in self._sinks:
            sink.log(step, metrics)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of a JSON lines file, without lines torn by a kill.

    A missing file has no records.
    """
    records = []
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    for line in text.split("\n"):
        if (record := record_of(line)) is not None:
            records.append(record)
    return records


def record_of(line: str) -> dict[str, Any] | None:
    """Return the JSON object of a line; None if it holds none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # torn, an integer of 5000 digits, nested too deeply
        return None
    return record if isinstance(record, dict) else None


def _is_torn(path: Path) -> bool:
    """Return whether a file's last line has no end."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def finite(value: object) -> object:
    """Return a value with null for each number, at any depth, that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
