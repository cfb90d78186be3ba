"""The choice of kills and the table of what they have shown."""

from collections import Counter
from typing import Any

import pytest
from kill_at_phase import EDGES, PHASES
from kills.choice import FIRST_ITERATION, ROLES, Plan
from kills.inputs import BATCH_SIZE
from kills.outcome import faults_of_ledger
from kills.table import computed_ratio, summarised, table


def killed(role: str, **values: Any) -> dict[str, Any]:
    """A kill as it stands in the results."""
    usual = {"role": role, "phase": "gen", "recovered_s": 10.0, "cold_s": 20.0, "survived": True}
    return usual | values


def run(*kills: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A run as it stands in the results."""
    return {"kills": kills, "faults": [], "equal": True, "ratio": 0.5} | values


def test_a_seed_chooses_the_same_kills_and_each_role_as_often_as_every_other() -> None:
    chosen = [Plan(seed=7).kill(number) for number in range(5 * len(ROLES))]
    assert chosen == [Plan(seed=7).kill(number) for number in range(5 * len(ROLES))]
    assert chosen != [Plan(seed=8).kill(number) for number in range(5 * len(ROLES))]
    assert set(Counter(kill.role for kill in chosen).values()) == {5}
    assert len({kill.moment for kill in chosen}) == len(chosen)


def test_the_kills_of_a_run_come_one_after_the_other_and_leave_it_time_to_end() -> None:
    plan = Plan(seed=0, per_run=3)
    first, second = plan.run_of(0), plan.run_of(3)
    assert [kill.number for kill in first + second] == list(range(6))
    for kills in (first, second):
        iterations = [kill.iteration for kill in kills]
        assert iterations == sorted(set(iterations))
        assert iterations[0] >= FIRST_ITERATION
        assert iterations[-1] < plan.iterations - 1


def test_a_driver_is_killed_at_every_edge_of_every_phase() -> None:
    plan = Plan(seed=0, roles=["driver"], at_boundaries=True)
    boundaries = {plan.kill(number).boundary for number in range(len(EDGES) * len(PHASES))}
    assert boundaries == {(edge, phase) for edge in EDGES for phase in PHASES}


def test_a_kill_costs_its_recovery_and_what_is_done_again() -> None:
    assert computed_ratio([], 5) is None
    assert computed_ratio([killed("reward")], 5) == pytest.approx(300 / 310)
    assert computed_ratio([killed("driver")], 5) == pytest.approx(300 / 340)
    both = [killed("reward"), killed("driver"), killed("policy", recovered_s=None)]
    assert computed_ratio(both, 50) == pytest.approx(3000 / (3000 + (10 + 40) / 2))


def test_the_table_shows_each_role_and_phase_in_a_hundred_columns() -> None:
    runs = [
        run(),
        run(killed("policy", recovered_s=30.0), killed("policy", phase="after save")),
        run(
            killed("engine", survived=False, recovered_s=None, cold_s=None),
            faults=["the driver ended with 1: " + "x" * 200],
            equal=False,
            ratio=None,
        ),
    ]
    summary = summarised(runs, goal=200)
    assert (summary["kills"], summary["survived"]) == (3, 2)
    assert (summary["runs"], summary["runs_without_fault"]) == (2, 1)
    policy = summary["roles"]["policy"]
    assert policy["recovery_s"] == {"median": 20.0, "worst": 30.0}
    assert policy["worst_share_of_cold_start"] == 1.5
    assert policy["phases"] == {"gen": [1, 1], "save": [1, 1]}
    assert summary["roles"]["engine"]["phases"] == {"gen": [0, 1]}
    assert summary["effective_time_ratio"] == 0.5
    lines = list(table(summary))
    assert max(map(len, lines)) <= 100
    assert any(line.split()[:4] == ["policy", "2", "/", "2"] for line in lines)


@pytest.mark.parametrize(
    "wrong",
    [
        {"iterations": 3},
        {"ledger": {"drawn": 64, "learnt": 60, "discarded": 4, "filtered": 0, "in_flight": 0}},
        {"ledger": {"drawn": 64, "learnt": 62, "discarded": 0, "filtered": 2, "in_flight": 0}},
    ],
)
def test_a_run_that_lost_or_repeated_a_sample_has_a_fault(wrong: dict[str, Any]) -> None:
    samples = 4 * BATCH_SIZE
    exact = {"drawn": samples, "learnt": samples, "discarded": 0, "filtered": 0, "in_flight": 0}
    summary = {"iterations": 4, "ledger": exact}
    assert not list(faults_of_ledger(summary, 4))
    assert list(faults_of_ledger(summary | wrong, 4))
