"""Callbacks: objects of the user's own classes, called with the events of a run."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rlhf_ray.errors import RlhfError
from rlhf_ray.observability.tracker_libraries import Connect, RunInfo
from rlhf_ray.plugins import load_function

EVENTS = (
    "on_run_begin",
    "on_stage_begin",
    "on_metrics",
    "on_samples",
    "on_stage_end",
    "on_run_end",
)
"""Methods that a callback may have, in the order in which they are first called."""


class CallbackRun:
    """A run as one callback hears of it; what the callback lacks is not called."""

    run_id, where, is_local = "", "called in the driver", True

    def __init__(self, make: Callable[[], object], info: RunInfo) -> None:
        self._callback = make()
        if not any(hasattr(self._callback, event) for event in EVENTS):
            raise RlhfError(f"it has none of the methods {', '.join(EVENTS)}")
        self._tell("on_run_begin", info.folder, info.config)

    def log(self, axis: str, step: int, metrics: Mapping[str, float]) -> None:
        """Tell metrics by their names in metrics.jsonl; ``axis`` is ``sft/step`` or PPO's."""
        stage, slash, _ = axis.rpartition("/")
        named = {name.removeprefix(f"{stage}{slash}"): value for name, value in metrics.items()}
        self._tell("on_metrics", stage or "ppo", step, named)

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Tell samples; ``name`` is ``completions``."""
        self._tell("on_samples", step, rows)

    def begin_stage(self, stage: str) -> None:
        """Tell that a stage begins, or goes on."""
        self._tell("on_stage_begin", stage)

    def end_stage(self, stage: str, folder: Path) -> None:
        """Tell that a stage is done, and where its files are."""
        self._tell("on_stage_end", stage, folder)

    def close(self, failed: bool) -> None:
        """Tell that the run ends."""
        self._tell("on_run_end", failed)

    def _tell(self, event: str, *told: object) -> None:
        try:
            getattr(self._callback, event, _nothing)(*told)
        except SystemExit as error:
            raise RlhfError(f"{event} raised SystemExit: {error.code}") from None


def _nothing(*_: object) -> None:
    """Stand for a method that a callback lacks."""


def callbacks(specs: Sequence[str]) -> dict[str, Connect]:
    """Return what makes each callback of ``run.callbacks``, by its name in the config.

    Raises:
        ConfigError: one cannot be loaded.
    """
    makes = {spec: load_function(spec, "run.callbacks") for spec in specs}

    def connect(make: Callable[..., object]) -> Connect:
        return lambda info, _: CallbackRun(make, info)

    return {spec: connect(make) for spec, make in makes.items()}
