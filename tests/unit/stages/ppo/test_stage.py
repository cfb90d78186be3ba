"""What the stage restores from the run's folder."""

from types import SimpleNamespace
from typing import Any

from rlhf_ray.driver.checkpoint import SavedCommit
from rlhf_ray.stages.ppo import stage


async def test_a_run_that_resumes_before_a_damaged_commit_says_so() -> None:
    loaded: list[Any] = []
    warned: list[tuple[int, str, str]] = []

    async def load(state: Any) -> None:
        loaded.append(state)

    roles: Any = SimpleNamespace(learners={"policy": SimpleNamespace(load=load)})
    guards: Any = SimpleNamespace(
        warn=lambda iteration, alarm: warned.append((iteration, alarm.guard, alarm.text))
    )
    whole = SavedCommit(3, {"weights": b"3"}, {}, {"iteration": 2})
    await stage._restore(roles, whole, guards)
    assert (loaded, warned) == ([whole.policy], [])
    before = SavedCommit(3, {"weights": b"3"}, {}, {"iteration": 2}, ("4 (state.json is torn)",))
    await stage._restore(roles, before, guards)
    ((iteration, guard, text),) = warned
    assert (iteration, guard) == (2, "damaged_commit")
    assert "4 (state.json is torn)" in text
    assert "resumes from version 3" in text
