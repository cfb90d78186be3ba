"""What many kills have shown: survived by role and phase, recovery beside cold starts, ratios."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, median
from typing import Any

from kill_at_phase import PHASES

from kills.choice import ROLES

Record = Mapping[str, Any]
"""A line of the results' file: a run, with its kills."""
ITERATION_S = 60.0
"""Length of the iterations for which the effective time ratio is computed."""
EVERY = (5, 50)
"""Iterations between two kills for which it is computed."""
REDOES = ("policy", "critic", "driver", "node")
"""Roles whose death costs half an iteration besides the recovery: what is learnt or done again."""
COLUMNS = (*PHASES, "between")


def summarised(runs: Sequence[Record], goal: int) -> dict[str, Any]:
    """Return all numbers of the table.

    Args:
        runs: records of undisturbed and of disturbed runs.
        goal: kills to be made in all.
    """
    disturbed = [run for run in runs if run["kills"]]
    kills = [kill for run in disturbed for kill in run["kills"]]
    ratios = [run["ratio"] for run in disturbed if run["ratio"] is not None]
    return {
        "goal": goal,
        "kills": len(kills),
        "survived": sum(kill["survived"] for kill in kills),
        "runs": len(disturbed),
        "runs_without_fault": sum(not run["faults"] for run in disturbed),
        "runs_equal_to_undisturbed": sum(bool(run["equal"]) for run in disturbed),
        "roles": {role: _of_role(role, kills) for role in ROLES if _made(role, kills)},
        "effective_time_ratio": mean(ratios) if ratios else None,
        "computed_ratio": {every: computed_ratio(kills, every) for every in EVERY},
        "faults": [fault for run in runs for fault in run["faults"]],
    }


def computed_ratio(kills: Sequence[Record], every: int) -> float | None:
    """Return the effective time ratio with a kill every so many iterations of 60 s.

    A kill is taken to cost its whole recovery, also where the run continues meanwhile, and for
    `REDOES` half an iteration more.
    """
    costs = [
        kill["recovered_s"] + (ITERATION_S / 2 if kill["role"] in REDOES else 0.0)
        for kill in kills
        if kill["recovered_s"] is not None
    ]
    useful_s = every * ITERATION_S
    return useful_s / (useful_s + mean(costs)) if costs else None


def _made(role: str, kills: Sequence[Record]) -> list[Record]:
    return [kill for kill in kills if kill["role"] == role]


def _of_role(role: str, kills: Sequence[Record]) -> dict[str, Any]:
    made = _made(role, kills)
    timed = [kill for kill in made if kill["recovered_s"] is not None]
    times = [kill["recovered_s"] for kill in timed]
    cold = [kill["cold_s"] for kill in timed if kill["cold_s"]]
    shares = [kill["recovered_s"] / kill["cold_s"] for kill in timed if kill["cold_s"]]
    return {
        "kills": len(made),
        "survived": sum(kill["survived"] for kill in made),
        "recovery_s": {"median": median(times), "worst": max(times)} if times else None,
        "cold_start_s": median(cold) if cold else None,
        "worst_share_of_cold_start": max(shares, default=None),
        "phases": {
            column: [sum(kill["survived"] for kill in there), len(there)]
            for column in COLUMNS
            if (there := [kill for kill in made if kill["phase"].split()[-1] == column])
        },
    }


def table(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines of at most 100 columns."""
    yield (
        f"{summary['survived']} of {summary['kills']} kills survived (goal {summary['goal']}); "
        f"{summary['runs_without_fault']} of {summary['runs']} runs without fault, "
        f"{summary['runs_equal_to_undisturbed']} with the same reward"
    )
    yield ""
    yield "            survived   recovery, s: median   worst   cold start, s   worst / cold start"
    for role, row in summary["roles"].items():
        recovery = row["recovery_s"] or {"median": None, "worst": None}
        yield (
            f"{role:<10} {row['survived']:>5} / {row['kills']:<3}"
            f"{_shown(recovery['median']):>21}{_shown(recovery['worst']):>8}"
            f"{_shown(row['cold_start_s']):>16}"
            f"{_shown(row['worst_share_of_cold_start'], 2):>21}"
        )
    yield ""
    yield "survived by phase" + "".join(f"{column:>9}" for column in COLUMNS)
    for role, row in summary["roles"].items():
        cells = (row["phases"].get(column) for column in COLUMNS)
        yield f"{role:<17}" + "".join(f"{_cell(cell):>9}" for cell in cells)
    yield ""
    yield f"effective time ratio, measured: {_shown(summary['effective_time_ratio'], 2)}"
    for every, ratio in summary["computed_ratio"].items():
        yield (
            f"computed for iterations of {ITERATION_S:.0f} s and a kill in {every}: "
            f"{_shown(ratio, 3)}"
        )
    yield from (f"FAULT: {fault[:93]}" for fault in summary["faults"])


def _cell(cell: Sequence[int] | None) -> str:
    return f"{cell[0]}/{cell[1]}" if cell else "."


def _shown(number: float | None, digits: int = 1) -> str:
    return "-" if number is None else f"{number:.{digits}f}"
