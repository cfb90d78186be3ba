"""Tests of the generators' state machine."""

from typing import get_args

import pytest

from rlhf_ray.generators.member import FOLLOWERS, Life
from rlhf_ray.types import GeneratorState

STATES: tuple[GeneratorState, ...] = get_args(GeneratorState)


def test_prompts_are_reached_through_the_proof_alone() -> None:
    """Only stale leads to ready: proof and publication take place there."""
    assert [state for state in STATES if "ready" in FOLLOWERS[state]] == ["stale"]


def test_a_failure_leads_back_through_a_new_start_alone() -> None:
    assert FOLLOWERS["suspect"] == {"dead", "retired"}
    assert FOLLOWERS["dead"] == {"restarting", "retired"}
    assert FOLLOWERS["restarting"] == {"starting", "retired"}


def test_whoever_has_left_stays_away_and_everyone_may_leave() -> None:
    assert FOLLOWERS["retired"] == set()
    assert all("retired" in FOLLOWERS[state] for state in STATES if state != "retired")


@pytest.mark.parametrize("before", STATES)
@pytest.mark.parametrize("after", STATES)
def test_a_life_goes_on_as_the_table_says(before: GeneratorState, after: GeneratorState) -> None:
    life = Life()
    life.state = before
    if after in FOLLOWERS[before]:
        life.to(after)
        assert life.state == after
    else:
        with pytest.raises(RuntimeError, match=f"that is {before} cannot become {after}"):
            life.to(after)
        assert life.state == before
