"""A run as an object, for notebooks and programs: what it measured, wrote and made.

Everything is read from the run's folder when it is asked for, so a `Run` may be opened while the
run goes on. torch is loaded by `Run.chat` and `Run.evaluate` alone.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ray.config import read_config
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.observability.sinks import read_jsonl

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from rlhf_ray.serving.versions import Versions

CURVES = ("objective/scores", "objective/kl", "response_length/mean")
"""Metrics that `Run.plot` draws unless others are named."""
COUNTERS = ("iteration", "step")
"""What a stage's records are numbered by."""


class Run:
    """A run's folder, of a run that is finished or goes on, or a copy of it."""

    def __init__(self, folder: str | Path) -> None:
        """
        Args:
            folder: ``run.dir``.

        Raises:
            ConfigError: it is no run's folder, or its config cannot be read.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ConfigError(f"{folder} is not the folder of a run; name its run.dir")
        self.config = read_config(self.folder)
        self._answering: Versions | None = None

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def metrics(self, stage: str = "ppo") -> "DataFrame":
        """Return what a stage logged: a row an iteration or step, a column a metric.

        ``docs/metrics.md`` says what each means. Empty before the first record.
        """
        return _table(read_jsonl(self.folder / stage / "metrics.jsonl"))

    def evaluations(self) -> "DataFrame":
        """Return PPO's evaluations on held-out prompts, a row each."""
        return _table(read_jsonl(self.folder / "ppo" / "eval.jsonl"))

    def samples(self, num: int = 1000) -> "DataFrame":
        """Return PPO's recorded samples, a row each, the newest first.

        Args:
            num: the most of them; a long run may have gigabytes.

        Raises:
            DataError: the run has recorded none.
        """
        from pandas import DataFrame

        from rlhf_ray.observability.samples.reading import Query, Samples

        recorded = Samples(self.folder / "ppo")
        rows = recorded.find(Query(), size=num).rows
        return DataFrame([record for row in rows if (record := recorded.record(row)) is not None])

    def versions(self) -> list[int]:
        """Return the versions of the policy that are kept, in order."""
        from rlhf_ray.driver.checkpoint import kept_versions

        return kept_versions(self.folder / "checkpoints")

    def plot(self, *metrics: str, stage: str = "ppo") -> "Figure":
        """Draw metrics of a stage over its iterations or steps, one below the other.

        Raises:
            DataError: the stage logged none of that name; the message names some that it did.
        """
        from matplotlib.figure import Figure

        table = self.metrics(stage)
        names = metrics or [name for name in CURVES if name in table] or list(table.columns[:3])
        missing = [name for name in names if name not in table]
        if missing or not names:
            raise DataError(
                f"{self.folder / stage} has no metric {', '.join(missing) or 'yet'}; it logged: "
                f"{', '.join(map(str, table.columns)) or 'nothing'}"
            )
        figure = Figure(figsize=(8, 2.2 * len(names)), layout="constrained")
        axes = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
        for axis, name in zip(axes, names, strict=True):
            table[name].dropna().plot(ax=axis, title=name)
        return figure

    def chat(self, question: str, version: int | str = "latest", seed: int | None = None) -> str:
        """Return the answer of a version of the policy to one question.

        Args:
            question: of one user, without history.
            version: a number of `versions`, ``latest`` or ``best``; or another model's name, such
                as ``sft``. All share one base in memory.
            seed: of sampling; None: ``run.seed``.

        Raises:
            DataError: the version is not kept, or the question is empty or too long.
        """
        from rlhf_ray.serving.versions import Versions

        is_version = isinstance(version, int) or version in ("latest", "best")
        model = f"ppo@{version}" if is_version else str(version)
        if self._answering is None:
            self._answering = Versions(self.config, [model])
        chosen = self.config.run.seed if seed is None else seed
        return self._answering.answer(model, question, chosen)

    def evaluate(self, *overrides: str) -> dict[str, Any]:
        """Compare the run's models on held-out prompts; returns the evaluation's summary.

        Args:
            overrides: ``dotted.key=value``, as ``rlhf-ray evaluate`` takes them.

        Raises:
            RlhfError: naming what went wrong, and the remedy.
        """
        from rlhf_ray.stages.pipeline import run_single

        folder = run_single(read_config(self.folder, overrides), "evaluate")
        summary: dict[str, Any] = json.loads((folder / "evaluate" / "summary.json").read_text())
        return summary

    def report(self) -> Path:
        """Write the report of the run as it is now, and return its path."""
        from rlhf_ray.report.report import build

        return build(self.folder)


def _table(records: Sequence[dict[str, Any]]) -> "DataFrame":
    """Return records as a table, numbered by their iteration or step."""
    from pandas import DataFrame

    table = DataFrame(records)
    counter = next((name for name in COUNTERS if name in table), None)
    return table if counter is None else table.set_index(counter)
