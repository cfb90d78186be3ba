"""An engine, a node and the driver are killed while a run of the real engines goes on.

It ends whole: all iterations, an exact ledger, no process and no shared memory left. Generators are
killed in `test_elastic_generators.py`, the other roles in `test_killed_roles.py`; that a run which
repeats work learns the same as an undisturbed one is for those two, and for `scripts/chaos.py`.
"""

from pathlib import Path

import pytest
from kills.choice import Plan
from kills.inputs import prepare
from kills.runs import ChaosRun

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(590)]

ROLES = ("engine", "driver", "node")


def test_a_run_survives_kills_of_an_engine_its_driver_and_a_node(tmp_path: Path) -> None:
    plan = Plan(seed=0, roles=ROLES, per_run=len(ROLES))
    config = prepare(tmp_path / "inputs")
    run = ChaosRun(tmp_path / "run", config, "ray", plan.iterations, plan.seed, plan.run_of(0))
    outcome = run.run()
    assert not outcome.faults
    assert {struck.kill.role for struck in outcome.struck} == set(ROLES)
