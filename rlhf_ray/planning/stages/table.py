"""Format what the stages of a run take, as text and as JSON values."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rlhf_ray.planning.memory import GB
from rlhf_ray.planning.role_times import ASSUMPTIONS, Range
from rlhf_ray.planning.stages.estimates import StageEstimate, whole_run

UNKNOWN = "not estimated"


def total_time(stages: Sequence[StageEstimate]) -> str:
    """Return the time of the run as one line, with the stages that are not in it."""
    unknown = ", ".join(stage.stage for stage in stages if stage.seconds is None)
    seconds = whole_run(stages).seconds
    if unknown:
        others = f"; the others take {_scaled(seconds, 3600)} hours" if seconds else ""
        return f"time of the run: {UNKNOWN}, because of {unknown}{others}"
    assert seconds is not None, "a run has stages"
    best, worst = (each / 86_400 for each in seconds)
    if best < 0.1:
        return f"hours of the run: {_scaled(seconds, 3600)}"
    return f"days of the run: {best:,.2f} to {worst:,.2f}"


def stage_table(stages: Sequence[StageEstimate], width: int) -> Iterator[str]:
    """Yield a line a stage, the bottom line, and notes: why something is not estimated."""
    yield ""
    columns = f"{'GB a process':>18}{'GB in run.dir':>20}{'most at a time':>18}"
    yield f"{'stage':<12}{'hours':>18}{columns}"
    total = whole_run(stages)
    if any(stage.seconds is None for stage in stages):
        total = replace(total, seconds=None)
    for stage in [*stages, total]:
        kept, peak = (stage.disk.kept, stage.disk.peak) if stage.disk else (None, None)
        cells = f"{_memory(stage):>18}{_scaled(kept, GB):>20}{_scaled(peak, GB):>18}"
        yield f"{stage.stage:<12}{_scaled(stage.seconds, 3600):>18}{cells}"
    for note in dict.fromkeys(stage.note for stage in stages if stage.note):
        named = ", ".join(stage.stage for stage in stages if stage.note == note)
        yield textwrap.fill(
            f"  {named}: {note}", width, subsequent_indent="    ", break_on_hyphens=False
        )
    for stage in stages:
        if stage.recorded:
            yield textwrap.fill(
                f"  {stage.stage}: {stage.recorded}", width, subsequent_indent="    "
            )


def assumed(stages: Sequence[StageEstimate]) -> list[str]:
    """Return the assumptions that the stages' estimates depend on, at best and at worst."""
    used = {name for stage in stages for name in stage.assumptions}
    return [
        f"{name}: {best:g} to {worst:g}"
        for name, (best, worst) in ASSUMPTIONS.items()
        if name in used
    ]


def as_values(stage: StageEstimate) -> dict[str, object]:
    """Return an estimate as JSON values; None: not estimated."""
    disk = stage.disk
    return {
        "stage": stage.stage,
        "hours_range": stage.seconds and [each / 3600 for each in stage.seconds],
        "memory_gb": None if stage.memory is None else stage.memory / GB,
        "on_gpu": stage.on_gpu,
        "disk_gb_range": disk and [each / GB for each in disk.kept],
        "disk_peak_gb_range": disk and [each / GB for each in disk.peak],
        "note": stage.note,
        "recorded": stage.recorded,
    }


def _memory(stage: StageEstimate) -> str:
    if stage.memory is None:
        return UNKNOWN
    return f"{stage.memory / GB:,.2f} {'GPU' if stage.on_gpu else 'CPU'}" if stage.memory else "-"


def _scaled(ends: Range | None, unit: float) -> str:
    return UNKNOWN if ends is None else _range((ends[0] / unit, ends[1] / unit))


def _range(ends: Range) -> str:
    """Return two ends as text, or one where they read the same."""
    best, worst = map(_number, ends)
    return worst if best == worst else f"{best} to {worst}"


def _number(value: float) -> str:
    if value == 0:
        return "-"
    if value < 0.01:
        return "<0.01"
    return f"{value:,.2f}" if value < 10 else f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"
