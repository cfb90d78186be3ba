"""Time and cost: what each actor was busy with, and when, as rows of coloured bars; GPU-hours."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rlhf_ray.observability.progress import clock_time
from rlhf_ray.observability.tracing import Span
from rlhf_ray.report.data import RunFiles, number
from rlhf_ray.report.sections import figure
from rlhf_ray.report.story import Card

_COLOURS = tuple(f"--c{index}" for index in range(1, 8))
_OTHER, _OTHER_COLOUR = "other", "--muted"
_MAX_ROWS = 40
_TIMELINE_ITERATIONS = 3
_LEAST_WIDTH = 0.15
"""Percent of the width that a bar has at least, so that short spans are seen."""

Totals = Mapping[str, Mapping[str, float]]
"""Seconds by row and by phase."""


@dataclass(frozen=True)
class Bar:
    """A stretch of time; places are in percent of the row's width."""

    left: float
    width: float
    colour: str
    """Variable of the page's CSS."""
    meaning: str
    """What it was and how long it took, shown on hover."""


@dataclass(frozen=True)
class Row:
    """The bars of an actor."""

    name: str
    total: str
    """How long it was busy."""
    bars: Sequence[Bar]


@dataclass(frozen=True)
class Bars:
    """Rows on one scale of time. HTML, so that it can be read at any width."""

    title: str
    rows: Sequence[Row]
    legend: Mapping[str, str]
    """Colour by phase."""
    end: str
    """Time at the right end."""
    caption: str


def phase_bars(title: str, totals: Totals, caption: str) -> Bars:
    """Return a row per actor: its phases side by side, the longest of all phases first."""
    colours = phase_colours(totals)
    longest_s = max((sum(phases.values()) for phases in totals.values()), default=0.0)
    rows = []
    for name, phases in totals.items():
        bars, left_s = list[Bar](), 0.0
        for shown, colour in colours.items():
            of = {phase: s for phase, s in phases.items() if _shown(phase, colours) == shown}
            if seconds := sum(of.values()):
                meaning = f"{shown}: {duration(seconds)}, {seconds / sum(phases.values()):.0%}"
                bars.append(_bar(left_s, seconds, longest_s, colour, meaning))
            left_s += seconds
        rows.append(Row(name, duration(left_s), bars))
    return Bars(title, rows, colours, duration(longest_s), caption)


def time_bars(files: RunFiles) -> list[Bars]:
    """Return the time by actor and phase, and the timeline of the last iterations."""
    if not files.phase_totals:
        return []
    totals = dict(list(files.phase_totals.items())[:_MAX_ROWS])
    left_out = len(files.phase_totals) - len(totals)
    note = f" trace.json has {left_out} more actors." if left_out else ""
    caption = f"Busy time of each actor by kind of work.{note}"
    charts = [phase_bars("Time by actor and phase", totals, caption)]
    spans = [span for span in _last_iterations(files.spans) if span.row in totals]
    if spans:
        charts.append(_timeline(spans, phase_colours(totals)))
    return charts


def phase_colours(totals: Totals) -> dict[str, str]:
    """Return a colour per phase, the longest phases first; the rest share one as `other`."""
    sums: dict[str, float] = {}
    for phases in totals.values():
        for name, seconds in phases.items():
            sums[name] = sums.get(name, 0.0) + seconds
    ranked = sorted(sums, key=lambda name: -sums[name])
    colours = dict(zip(ranked, _COLOURS, strict=False))
    return colours if len(ranked) <= len(colours) else {**colours, _OTHER: _OTHER_COLOUR}


def duration(seconds: float) -> str:
    """Return a time with its unit: seconds, minutes or hours."""
    if seconds < 180:
        return f"{figure(seconds)} s"
    return f"{seconds / 60:.1f} min" if seconds < 3 * 3600 else f"{seconds / 3600:,.1f} h"


def _timeline(spans: Sequence[Span], colours: Mapping[str, str]) -> Bars:
    """Return a row per actor with its spans; nested ones come last, so that they stay visible."""
    origin_s = min(span.start_s for span in spans)
    longest_s = max(span.end_s for span in spans) - origin_s
    bars: dict[str, list[Bar]] = {span.row: [] for span in spans}
    for span in sorted(spans, key=lambda span: span.start_s - span.end_s):
        meaning = f"{span.name}: {duration(span.end_s - span.start_s)}"
        bars[span.row].append(
            _bar(
                span.start_s - origin_s,
                span.end_s - span.start_s,
                longest_s,
                colours[_shown(span.name, colours)],
                meaning,
            )
        )
    return Bars(
        f"Timeline of the last {_TIMELINE_ITERATIONS} iterations",
        [Row(name, "", found) for name, found in bars.items()],
        {},
        duration(longest_s),
        "Colours as above; gaps are idle time. To see the whole run, open trace.json at "
        "ui.perfetto.dev.",
    )


def _bar(left_s: float, seconds: float, longest_s: float, colour: str, meaning: str) -> Bar:
    scale = 100 / (longest_s or 1.0)
    return Bar(left_s * scale, max(seconds * scale, _LEAST_WIDTH), colour, meaning)


def _shown(phase: str, colours: Mapping[str, str]) -> str:
    return phase if phase in colours else _OTHER


def _last_iterations(spans: Sequence[Span]) -> list[Span]:
    """Return the spans of the last iterations; of one that a kill had repeated, the last time."""
    begun = {
        span.args.get("iteration"): span.start_s
        for span in spans
        if (span.row, span.name) == ("driver", "gen")
    }
    numbers = sorted({span.args["iteration"] for span in spans if "iteration" in span.args})
    latest = set(numbers[-_TIMELINE_ITERATIONS:])
    return [
        span
        for span in spans
        if (number := span.args.get("iteration")) in latest
        and span.start_s >= begun.get(number, 0.0)
    ]


def cost(files: RunFiles) -> list[Card]:
    """Return the cards of time, hardware and money."""
    return [*_time(files), *_hours(files), *_speed(files)]


def _time(files: RunFiles) -> Iterator[Card]:
    seconds = {stage: _seconds(each.get("seconds")) for stage, each in files.summaries.items()}
    if any(seconds.values()):
        longest = max(seconds, key=lambda stage: seconds[stage])
        share = seconds[longest] / sum(seconds.values())
        sentence = f"Wall time of the finished stages; {longest} took {share:.0%} of it."
        yield Card("Time", clock_time(sum(seconds.values())), sentence)


def _hours(files: RunFiles) -> Iterator[Card]:
    ppo = files.summaries.get("ppo", {})
    gpus, hours = number(ppo, "num_gpus"), _seconds(ppo.get("seconds")) / 3600
    if not hours:
        return
    if gpus:
        sentence = f"PPO's wall time on the {figure(gpus)} GPUs that it held."
        yield Card("GPU-hours of PPO", figure(gpus * hours), sentence)
        if (price := number(files.config, "cluster", "gpu_hour_price")) is not None:
            sentence = f"Its GPU-hours at {figure(price)} each (cluster.gpu_hour_price)."
            yield Card("Price of PPO", figure(price * gpus * hours), sentence)
    elif gpus == 0 and (cores := _cores(files)):
        sentence = f"PPO's wall time on {cores} cores, a thread each; it held no GPU."
        yield Card("Core-hours of PPO", figure(cores * hours), sentence)


def _cores(files: RunFiles) -> int:
    """Return the threads of PPO's actors: the rows of the trace that are named for a role."""
    roles = files.option("cluster.roles") or {}
    used = [row.rpartition("-")[0] for row in files.phase_totals]
    each = number(files.config, "cluster", "threads_per_actor") or 1
    threads = (number(roles, role, "threads") or each for role in used if role in roles)
    return round(sum(threads))


def _speed(files: RunFiles) -> Iterator[Card]:
    ppo = files.summaries.get("ppo")
    episodes, rate = number(ppo, "episodes"), number(ppo, "episodes_per_s")
    if episodes is not None:
        speed = f", {figure(rate)} per second" if rate is not None else ""
        restarts = number(ppo, "generator_restarts") or 0
        yield Card(
            "Rollouts trained on",
            figure(episodes),
            f"Answers that PPO sampled and trained on{speed}. Generator restarts: {restarts:.0f}.",
        )


def _seconds(value: object) -> float:
    """Return a stage's seconds, given as a number or as phases, which may include a `total`."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, dict):
        return float(value.get("total", sum(value.values())))
    return 0.0
