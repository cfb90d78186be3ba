"""Where metrics go: JSON lines, TensorBoard, or both."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from rlhf_ray.observability.metrics import check


class Sink(Protocol):
    """Takes the metrics of one step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record ``metrics`` of ``step``."""
        ...

    def close(self) -> None:
        """Release what the sink holds."""
        ...


class JsonlSink:
    """Appends one JSON object a line, flushed, so that a reader sees it at once.

    Also holds sample texts: `append` takes any record, such as a completion
    ``{iteration, prompt, response, score, kl, length, finish_reason}``.

    Args:
        path: file to append to; it and its folder are made on the first record.
        step_key: the key under which `log` writes the step.
    """

    def __init__(self, path: str | Path, step_key: str = "iteration") -> None:
        self._path = Path(path)
        self._step_key = step_key
        self._file: TextIO | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append ``{step_key: step, **metrics}``."""
        self.append({self._step_key: step, **metrics})

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one record; numbers that are not finite, which JSON lacks, become null."""
        if self._file is None:
            self._file = _open_for_append(self._path)
        line = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()

    def truncate_after(self, key: str, value: float) -> None:
        """Cut the file back to the records with ``record[key] <= value`` (for resume).

        Records without ``key`` stay; a line torn by a kill goes. The file is replaced atomically.
        """
        self.close()
        if not self._path.exists():
            return
        kept = [record for record in read_jsonl(self._path) if record.get(key, value) <= value]
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in kept]
        new = self._path.with_name(self._path.name + ".new")
        new.write_text("".join(lines), encoding="utf-8")
        os.replace(new, self._path)

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


class TensorBoardSink:
    """Writes scalars for TensorBoard.

    Args:
        folder: where the event files go.
        purge_step: on resume, the first step that is done again: older events from there on
            are hidden.
    """

    def __init__(self, folder: str | Path, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write each metric as a scalar at ``step``."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class Sinks:
    """Fans out to several sinks, in order, and refuses metrics that are not registered."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one step everywhere.

        Raises:
            KeyError: a name is not in the registry of metrics; nothing is logged then.
        """
        check(metrics)
        for sink in self._sinks:
            sink.log(step, metrics)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Records of a JSON lines file; a line that does not parse was torn by a kill: left out.

    An absent file has no records.
    """
    records = []
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    for line in text.split("\n"):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _open_for_append(path: Path) -> TextIO:
    """Open for appending at the start of a line, even where a kill tore the last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = False
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
    file = path.open("a", encoding="utf-8")
    if torn:
        file.write("\n")
    return file


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
