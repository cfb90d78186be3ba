"""THE loop over fake roles, resumed with another value: it counts from the next iteration on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from harness import Harness, make_config

from rlhf_ray.config import resolve

DONE = 4
"""Iterations before the change; the run has two more."""

Record = Mapping[str, float]


def retuned(folder: Path, **changed: Any) -> tuple[list[Record], list[Record]]:
    """Return the metrics of a run that was resumed with other values, and of one that was not."""
    whole = Harness(make_config(folder / "whole"))
    whole.run()
    Harness(make_config(folder / "run", iterations=DONE)).run()
    rewards = changed.pop("rewards", {})
    config = make_config(folder / "run", **changed)
    values = config.model_dump(mode="json")
    values["rewards"][0] |= rewards
    again = Harness(resolve(values))
    again.run()
    now: list[Record] = [*again.metrics()]
    before: list[Record] = [*whole.metrics()]
    assert now[:DONE] == before[:DONE]
    assert len(now) == 6
    return now, before


@pytest.mark.parametrize(
    ("changed", "lost"),
    [
        ({"missing_eos_penalty": 0.5}, lambda r: 0.5 * (1 - r["response_length/eos_share"])),
        ({"overlong": {"per_token": 0.1}}, lambda r: 0.1 * r["response_length/mean"]),
        ({"rewards": {"weight": 3.0}}, lambda r: -2 * r["objective/scores"]),
        ({"kl_coef": 0.9}, lambda r: (0.9 - r["objective/kl_coef"]) * r["objective/kl"]),
    ],
    ids=["eos penalty", "length penalty", "weight", "kl_coef"],
)
def test_a_changed_reward_counts_from_the_next_iteration_on(
    changed: dict[str, Any], lost: Any, tmp_path: Path
) -> None:
    """The first iteration after the change samples as before, and is rewarded otherwise."""
    now, before = retuned(tmp_path, **changed)
    expected = before[DONE]["objective/rlhf_reward"] - lost(before[DONE])
    assert lost(before[DONE])
    assert now[DONE]["objective/rlhf_reward"] == pytest.approx(expected)
    assert now[DONE]["response_length/mean"] == before[DONE]["response_length/mean"]
    assert now[DONE + 1] != before[DONE + 1]


def test_a_changed_clip_bounds_the_scores(tmp_path: Path) -> None:
    runs = retuned(tmp_path, rewards={"clip": 0.5})
    now, before = (run[DONE] for run in runs)
    scores = [r["objective/rlhf_reward"] - r["objective/non_score_reward"] for r in (now, before)]
    assert scores[0] <= 0.5 < scores[1]
    assert now["objective/scores"] == before["objective/scores"], "which are raw"


@pytest.mark.parametrize(
    ("changed", "target", "horizon"),
    [({"kl_target": 0.01}, 0.01, 80), ({"kl_horizon": 160}, 0.5, 160)],
)
def test_a_changed_target_or_horizon_moves_the_coefficient_that_was_reached(
    changed: dict[str, Any], target: float, horizon: int, tmp_path: Path
) -> None:
    now, before = retuned(tmp_path, **changed)
    first, second = (record["objective/kl_coef"] for record in now[DONE:])
    assert first == before[DONE]["objective/kl_coef"] != 0.2
    error = min(max(now[DONE]["objective/kl"] / target - 1, -0.2), 0.2)
    assert second == pytest.approx(first * (1 + error * 8 / horizon))
    assert second != before[DONE + 1]["objective/kl_coef"]
