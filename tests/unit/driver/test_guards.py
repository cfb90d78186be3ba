"""Tests of each guard; measured numbers are from the recipe's tiny proof of improvement."""

import math
from typing import Any

import pytest
import torch

from rlhf_ray.algorithms.kl import kl_estimate
from rlhf_ray.config import load, resolve
from rlhf_ray.config.guards import GuardsConfig
from rlhf_ray.driver.guards import (
    GUARDS,
    WATCHED,
    Alarm,
    alarms,
    non_finite,
    prompt_reuse,
    remembered,
)
from rlhf_ray.errors import ConfigError

HEALTHY = {
    "response/repeating_share": 0.01,
    "response/distinct_bigrams": 0.999,
    "objective/kl": 1.5,
    "objective/entropy": 2.0,
    "response_length/eos_share": 0.09,
    "policy/ratio_exceeded": 0.0,
    "val/ratio_minibatch_max": 1.1,
    "loss/policy_avg": -0.02,
    "policy/grad_norm": 0.2,
    "loss/value_avg": 0.06,
    "val/grad_norm": 0.4,
}
USUAL = {name: [abs(HEALTHY[name])] * 5 for name in WATCHED}


def guards(**sections: dict[str, Any]) -> GuardsConfig:
    return resolve({"guards": sections}).guards


def seen(metrics: dict[str, float], losses: Any = USUAL, **sections: dict[str, Any]) -> list[Alarm]:
    return alarms(guards(**sections), HEALTHY | metrics, losses)


def test_a_healthy_iteration_sets_off_nothing() -> None:
    assert seen({}) == []
    assert seen({}, losses={}) == []


class TestRepetition:
    @pytest.mark.parametrize(
        ("repeating", "distinct", "kl"),
        [(0.98, 0.40, 119.0), (0.48, 0.75, 96.0), (1.0, 0.5, 116.0), (0.0, 0.75, 96.0)],
    )
    def test_it_fires_on_a_gamed_reward(self, repeating: float, distinct: float, kl: float) -> None:
        (alarm,) = seen(
            {
                "response/repeating_share": repeating,
                "response/distinct_bigrams": distinct,
                "objective/kl": kl,
            }
        )
        assert (alarm.guard, alarm.action) == ("repetition", "warn")
        assert alarm.numbers["response/repeating_share"] == repeating
        assert f"{repeating:.0%} of the responses" in alarm.text
        assert f"a KL of {kl:.3g} nats" in alarm.text
        assert "raise ppo.kl_coef" in alarm.text
        assert "set ppo.missing_eos_penalty if few responses end (9% do)" in alarm.text

    @pytest.mark.parametrize(("repeating", "distinct"), [(0.0, 0.999), (0.02, 0.99), (0.2, 0.8)])
    def test_it_is_silent_on_healthy_answers(self, repeating: float, distinct: float) -> None:
        found = {"response/repeating_share": repeating, "response/distinct_bigrams": distinct}
        assert seen(found) == []

    def test_its_bounds_are_the_configs(self) -> None:
        found = {"response/repeating_share": 0.1, "response/distinct_bigrams": 0.9}
        assert seen(found, repetition={"max_repeating_share": 0.05})
        assert seen(found, repetition={"min_distinct_bigrams": 0.95})
        assert not seen({"response/repeating_share": 1.0}, repetition={"action": "off"})


class TestNegativeKl:
    def test_suppressing_the_end_of_a_response_makes_the_kl_negative(self) -> None:
        """ref(EOS) = .1, pi(EOS) = .5, the others in proportion; EOS itself is never drawn."""
        policy, ref = torch.tensor(0.5 / 9).log(), torch.tensor(0.9 / 9).log()
        per_token = float(kl_estimate(policy, ref, "k1"))
        assert per_token == pytest.approx(math.log(0.5 / 0.9), abs=1e-6)
        assert per_token == pytest.approx(-0.5878, abs=1e-4)
        assert seen({"objective/kl": per_token}) == []
        (alarm,) = seen({"objective/kl": 2 * per_token})
        assert (alarm.guard, alarm.action) == ("negative_kl", "warn")
        for cause in ("padding counts as actions", "end-of-sequence token is suppressed or forced"):
            assert cause in alarm.text
        assert "is -1.18 nats a response, below -1" in alarm.text

    def test_its_bound_is_the_configs(self) -> None:
        assert seen({"objective/kl": -0.6}, negative_kl={"min_kl": -0.5, "action": "stop"})
        assert not seen({"objective/kl": -9.0}, negative_kl={"action": "off"})

    def test_a_negative_kl_of_old_samples_is_laid_to_their_age(self) -> None:
        (alarm,) = seen({"objective/kl": -3.0, "rollout/staleness": 2.0})
        assert "up to 2 versions old" in alarm.text
        (alarm,) = seen({"objective/kl": -3.0, "rollout/staleness": 0.0})
        assert "versions" not in alarm.text


class TestRatio:
    @pytest.mark.parametrize(
        ("action", "done"),
        [("skip", "moved no weights"), ("stop", "moved no weights"), ("warn", "all the same")],
    )
    def test_it_says_how_many_and_what_became_of_them(self, action: str, done: str) -> None:
        exceeded = {"policy/ratio_exceeded": 2.0, "val/ratio_minibatch_max": 57.3}
        (alarm,) = seen(exceeded, ratio={"action": action})
        assert (alarm.guard, alarm.action) == ("ratio", action)
        assert "exceeds 10: 2, the largest mean 57.3" in alarm.text
        assert done in alarm.text

    def test_a_policy_that_does_not_look_is_fine(self) -> None:
        metrics = {k: v for k, v in HEALTHY.items() if "ratio" not in k}
        assert alarms(guards(ratio={"action": "off"}), metrics, USUAL) == []


class TestLossSpike:
    @pytest.mark.parametrize("name", WATCHED)
    def test_it_fires_above_a_multiple_of_the_median(self, name: str) -> None:
        usual = abs(HEALTHY[name])
        assert seen({name: 9.9 * usual}) == []
        for value in (10.1 * usual, -10.1 * usual):
            (alarm,) = seen({name: value})
            assert (alarm.guard, alarm.action) == ("loss_spike", "warn")
            assert f"{name} of {abs(value):.3g} is 10.1 times its median" in alarm.text
            assert alarm.numbers == {name: value}

    def test_the_median_does_not_mind_one_spike(self) -> None:
        losses = USUAL | {"loss/value_avg": [0.05, 0.06, 600.0, 0.06, 0.07]}
        assert seen({"loss/value_avg": 0.7}, losses)
        assert not seen({"loss/value_avg": 0.5}, losses)

    def test_it_waits_for_a_history(self) -> None:
        losses = {name: values[:4] for name, values in USUAL.items()}
        assert seen({"loss/value_avg": 600.0}, losses) == []

    def test_what_was_always_zero_cannot_spike(self) -> None:
        assert seen({"loss/value_avg": 1.0}, USUAL | {"loss/value_avg": [0.0] * 5}) == []

    def test_a_run_without_a_critic_is_fine(self) -> None:
        metrics = {k: v for k, v in HEALTHY.items() if k not in ("loss/value_avg", "val/grad_norm")}
        losses = remembered({}, metrics, 20)
        assert losses["loss/policy_avg"] == [0.02]
        assert losses["loss/value_avg"] == []
        assert alarms(guards(), metrics, losses) == []

    def test_the_latest_values_are_remembered(self) -> None:
        losses: Any = {}
        for value in range(1, 8):
            losses = remembered(losses, HEALTHY | {"loss/value_avg": float(-value)}, window=5)
        assert losses["loss/value_avg"] == [3.0, 4.0, 5.0, 6.0, 7.0]


@pytest.mark.parametrize(("drawn", "warns"), [(800, False), (801, True)])
def test_more_than_one_pass_over_the_prompts_is_told(drawn: int, warns: bool) -> None:
    assert (prompt_reuse(drawn, 800) is not None) is warns
    alarm = prompt_reuse(2000, 800)
    assert alarm is not None
    assert "will draw 2000 prompts from a set of 800: 2.5 epochs" in alarm.text
    assert alarm.guard in GUARDS


@pytest.mark.parametrize("guard", ["repetition", "negative_kl", "ratio", "loss_spike"])
def test_off_may_be_written_without_quotes(guard: str) -> None:
    """YAML reads a bare off as false."""
    config = load(None, [f"guards.{guard}.action=off"])
    assert getattr(config.guards, guard).action == "off"


class TestNonFinite:
    @pytest.mark.parametrize(
        "name", ["loss/policy_avg", "loss/value_avg", "policy/grad_norm", "objective/kl"]
    )
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("spike", ["off", "warn", "rollback", "stop"])
    def test_it_rolls_back_whatever_the_guard_of_spikes_does(
        self, name: str, value: float, spike: str
    ) -> None:
        (alarm,) = seen({name: value}, loss_spike={"action": spike})
        assert (alarm.guard, alarm.action) == ("non_finite", "rollback")
        assert list(alarm.numbers) == [name]
        assert f"{name} is not finite; policy and critic go back" in alarm.text

    def test_it_may_stop_the_run(self) -> None:
        (alarm,) = seen({"loss/value_avg": -math.inf}, {}, non_finite={"action": "stop"})
        assert alarm.action == "stop"

    @pytest.mark.parametrize("action", ["off", "warn"])
    def test_it_cannot_be_switched_off(self, action: str) -> None:
        with pytest.raises(ConfigError, match=r"guards\.non_finite\.action"):
            guards(non_finite={"action": action})

    def test_what_may_be_undefined_passes(self) -> None:
        # Constant returns have no variance to explain.
        assert not non_finite({"loss/policy_avg": -0.1, "val/explained_variance": math.nan})
