"""The report's section on reliability: the ledger of samples, restarts, and the time lost."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from rlhf_ray.report.activity import Bars, phase_bars
from rlhf_ray.report.data import Record, RunFiles, number

_MAX_EVENTS = 40
_ORDINARY = ("start", "stopped", "interrupted")
"""Records of every run, which are no events unless they cost time."""


@dataclass(frozen=True)
class Reliability:
    """What happened to a PPO run, over all its processes."""

    ratio: float | None
    """Effective training time ratio; None while the run has no summary."""
    ledger: Sequence[tuple[str, float]]
    """Number of samples by what became of them."""
    restarts: Sequence[tuple[str, float]]
    """Number of restarts by role, without roles that had none."""
    chart: Bars | None
    events: Sequence[Record]
    """The latest restarts and losses."""
    num_events: int


def reliability(files: RunFiles) -> Reliability | None:
    """Return the section; None for a run of an older version, or one without PPO."""
    summary = files.summaries.get("ppo", {})
    ratio = number(summary, "effective_time_ratio")
    if ratio is None and not files.outages:
        return None
    restarts: Counter[str] = Counter()
    lost_s: dict[str, float] = defaultdict(float)
    for record in files.outages:
        restarts[str(record.get("role", "–"))] += int(number(record, "restarts") or 0)
        lost_s[_cause(record)] += number(record, "lost_s") or 0.0
    events = [record for record in files.outages if _is_event(record)]
    counts = [
        (name.replace("_", " "), number(summary, "ledger", name))
        for name in ("drawn", "learnt", "discarded", "filtered", "in_flight")
    ]
    useful_s = number(summary, "seconds_useful")
    return Reliability(
        ratio=ratio,
        ledger=[(name, count) for name, count in counts if count is not None],
        restarts=[(role, num) for role, num in restarts.items() if num],
        chart=_chart(useful_s, {cause: s for cause, s in lost_s.items() if s > 0}),
        events=[_event(record) for record in events[-_MAX_EVENTS:]],
        num_events=len(events),
    )


def _chart(useful_s: float | None, lost_s: dict[str, float]) -> Bars | None:
    if not lost_s:
        return None
    times = ({"useful": useful_s} if useful_s else {}) | lost_s
    return phase_bars(
        "Useful and lost time",
        {"run": times},
        "Useful is the time of iterations whose commit lasted. The first start, and pauses on "
        "request or after a signal, are left out.",
    )


def _is_event(record: Record) -> bool:
    return record.get("cause") not in _ORDINARY or bool(number(record, "lost_s"))


def _cause(record: Record) -> str:
    return f"{record.get('role', '–')}: {record.get('cause', '–')}"


def _event(record: Record) -> Record:
    at = number(record, "time")
    lost_s = number(record, "lost_s") or 0.0
    return {
        "time": "–" if at is None else f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}",
        "what": _cause(record),
        "restarts": int(number(record, "restarts") or 0),
        "out_s": lost_s if (out_s := number(record, "seconds")) is None else out_s,
        "lost_s": lost_s,
    }
