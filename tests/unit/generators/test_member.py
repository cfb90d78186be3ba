"""Tests of the generators' state machine."""

from typing import get_args

import pytest

from rlhf_ray.generators.member import TRANSITIONS, Member
from rlhf_ray.types import GeneratorState

STATES: tuple[GeneratorState, ...] = get_args(GeneratorState)


def test_a_generator_gets_prompts_only_after_its_proof() -> None:
    """Proof and publication take place in stale, so it alone leads to ready."""
    assert [state for state in STATES if "ready" in TRANSITIONS[state]] == ["stale"]


def test_a_failed_generator_returns_through_a_restart_alone() -> None:
    assert TRANSITIONS["suspect"] == {"dead", "retired"}
    assert TRANSITIONS["dead"] == {"restarting", "retired"}
    assert TRANSITIONS["restarting"] == {"starting", "retired"}


def test_any_generator_may_retire_and_a_retired_one_never_returns() -> None:
    assert TRANSITIONS["retired"] == set()
    assert all("retired" in TRANSITIONS[state] for state in STATES if state != "retired")


@pytest.mark.parametrize("before", STATES)
@pytest.mark.parametrize("after", STATES)
def test_a_generator_changes_state_as_the_table_allows(
    before: GeneratorState, after: GeneratorState
) -> None:
    member = Member("generator-0", state=before)
    if after in TRANSITIONS[before]:
        member.change_to(after)
        assert member.state == after
    else:
        with pytest.raises(RuntimeError, match=f"that is {before} cannot become {after}"):
            member.change_to(after)
        assert member.state == before
