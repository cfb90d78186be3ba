"""Each role is killed once while a run of the real engines goes on; it ends whole.

A whole run: all iterations, an exact ledger, no process and no shared memory left. That a run which
repeats work learns the same as an undisturbed one is for `scripts/chaos.py`.
"""

from pathlib import Path

import pytest
from kills.choice import ROLES, Plan
from kills.inputs import prepare
from kills.runs import ChaosRun

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(590)]


def test_a_run_survives_a_kill_of_each_role(tmp_path: Path) -> None:
    plan = Plan(seed=0, roles=ROLES, per_run=len(ROLES))
    config = prepare(tmp_path / "inputs")
    run = ChaosRun(tmp_path / "run", config, "ray", plan.iterations, plan.seed, plan.run_of(0))
    outcome = run.run()
    assert not outcome.faults
    assert {struck.kill.role for struck in outcome.struck} == set(ROLES)
