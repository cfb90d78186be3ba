"""The top of the report: each card says what the files say, and what they do not say."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.report.activity import cost
from rlhf_ray.report.data import read
from rlhf_ray.report.story import Card, grounds, outcomes, trained, verdict

RISING = [0.1, 0.22, 0.28, 0.41, 0.5, 0.62, 0.68, 0.79, 0.91, 1.0]
LEDGER = {"drawn": 64, "learnt": 64, "discarded": 0, "filtered": 0, "in_flight": 0}


def write(folder: Path, name: str, *records: object) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def ppo(folder: Path, scores: Sequence[float | None], kl: float = 1.0) -> None:
    records = (
        {"iteration": i, "objective/scores": score, "objective/kl": kl}
        for i, score in enumerate(scores, 1)
    )
    write(folder, "ppo/metrics.jsonl", *records)


def evaluated(folder: Path, rate: float, low: float, high: float, **more: object) -> None:
    win_rate = {"value": rate, "ci95": [low, high]}
    models = {"sft": {}, "ppo": {}}
    write(
        folder,
        "evaluate/summary.json",
        {"models": models, "win_rate": win_rate, "num_prompts": 200} | more,
    )


def card(cards: Sequence[Card], title: str) -> Card:
    (found,) = [each for each in cards if each.title == title]
    return found


@pytest.mark.parametrize(
    ("scores", "value", "sentence", "tone"),
    [
        (RISING, "0.302 → 0.8", "It rose over 10 iterations.", "good"),
        (RISING[::-1], "0.8 → 0.302", "It fell over 10 iterations.", "bad"),
        ([0.0, 1.0, 0.1, 1.0], "0.5 → 0.55", "did not move beyond its own spread", "doubt"),
        ([0.5, 0.7], "0.5 → 0.7", "2 iterations are too few", "open"),
        ([0.5], "0.5", "One iteration is too few", "open"),
        ([0.5, None], "0.5", "the reward is not finite in the last iteration", "bad"),
        ([None], "–", "PPO diverged", "bad"),
    ],
)
def test_the_reward(
    scores: Sequence[float | None], value: str, sentence: str, tone: str, tmp_path: Path
) -> None:
    ppo(tmp_path, scores)
    found = card(outcomes(read(tmp_path)), "Training reward")
    assert (found.value, found.tone) == (value, tone)
    assert sentence in found.sentence


@pytest.mark.parametrize(
    ("rate", "low", "high", "sentence", "tone"),
    [
        (0.8, 0.7, 0.9, "PPO's answers are better than SFT's. 95% interval 0.70 to 0.90", "good"),
        (0.5, 0.4, 0.6, "Too close to tell PPO from SFT.", "doubt"),
        (0.2, 0.1, 0.3, "PPO's answers are worse than SFT's.", "bad"),
        (0.5, 0.5, 0.5, "PPO and SFT tie on every prompt, so there is no interval", "doubt"),
    ],
)
def test_the_win_rate(
    rate: float, low: float, high: float, sentence: str, tone: str, tmp_path: Path
) -> None:
    evaluated(tmp_path, rate, low, high)
    found = card(outcomes(read(tmp_path)), "Win rate against SFT")
    assert (found.value, found.tone) == (f"{rate:.2f}", tone)
    assert found.sentence.startswith(sentence)
    assert low == high or found.sentence.endswith("from 200 prompts.")


def test_an_evaluation_of_an_older_version_and_a_missing_one_are_said(tmp_path: Path) -> None:
    write(tmp_path, "ppo/summary.json", {"adapter_version": 9})
    missing = card(outcomes(read(tmp_path)), "Win rate against SFT")
    assert (missing.value, missing.tone) == ("–", "open")
    (tmp_path / "ppo/summary.json").unlink()
    ppo(tmp_path, RISING)
    assert card(outcomes(read(tmp_path)), "Win rate against SFT").tone == "open"
    write(tmp_path, "ppo/summary.json", {"adapter_version": 9})
    evaluated(tmp_path, 0.8, 0.7, 0.9, policy_version=4)
    old = card(outcomes(read(tmp_path)), "Win rate against SFT")
    assert old.tone == "doubt"
    assert old.sentence.endswith("This was version 4; the policy is at 9 by now.")


@pytest.mark.parametrize(
    ("kl", "sentence", "tone"),
    [
        (2.0, "stayed near the SFT model", "good"),
        (0.01, "hardly moved", "doubt"),
        (30.0, "as where a reward is gamed", "doubt"),
        (-0.5, "no true KL", "bad"),
    ],
)
def test_the_kl(kl: float, sentence: str, tone: str, tmp_path: Path) -> None:
    ppo(tmp_path, [0.0, 1.0], kl)
    found = card(grounds(read(tmp_path)), "KL to the reference")
    assert sentence in found.sentence
    assert found.tone == tone


def test_the_guards(tmp_path: Path) -> None:
    ppo(tmp_path, [0.0, 1.0])
    silent = card(grounds(read(tmp_path)), "Warnings of guards")
    assert (silent.value, silent.tone) == ("0", "good")
    warned = [{"guard": "loss_spike", "iteration": i, "text": "t"} for i in (3, 5)]
    write(tmp_path, "ppo/warnings.jsonl", *warned, {"guard": "ratio", "iteration": 8, "text": "t"})
    found = card(grounds(read(tmp_path)), "Warnings of guards")
    assert (found.value, found.tone) == ("3", "doubt")
    assert "loss spike 2 times and ratio once, last in iteration 8" in found.sentence


@pytest.mark.parametrize(
    ("ledger", "sentence", "tone"),
    [
        ({}, "learnt exactly once", "good"),
        ({"learnt": 56, "discarded": 8}, "None was learnt twice; the rest: 8 discarded.", "doubt"),
        ({"learnt": 56, "filtered": 8}, "the rest: 8 filtered.", "good"),
        ({"learnt": 60}, "4 are not accounted for", "bad"),
        ({"learnt": 70}, "6 are counted twice", "bad"),
    ],
)
def test_the_ledger(ledger: dict[str, int], sentence: str, tone: str, tmp_path: Path) -> None:
    write(tmp_path, "ppo/summary.json", {"ledger": LEDGER | ledger})
    found = card(grounds(read(tmp_path)), "Samples learnt")
    assert sentence in found.sentence
    assert found.tone == tone


def test_what_was_trained_names_people_and_the_run_it_was_branched_from(tmp_path: Path) -> None:
    config: dict[str, Any] = {"model": {"path": "m"}, "ppo": {"iterations": 4, "batch_size": 8}}
    write(tmp_path, "config.yaml", config | {"lora": {"r": 2}})
    assert trained(read(tmp_path)) == "m is to be trained."
    write(tmp_path, "sft/summary.json", {"loss": 1.0})
    write(tmp_path, "rank/summary.json", {"answers": 40, "people": 1})
    write(tmp_path, "branch.json", {"run": "first", "version": 7})
    ppo(tmp_path, [0.0, 1.0])
    assert trained(read(tmp_path)) == (
        "m went through supervised fine-tuning and 2 of 4 iterations of PPO with 8 rollouts each, "
        "as a LoRA adapter of rank 2. 1 person gave 40 verdicts on its pairs. It is a branch of "
        "the run first, from its version 7."
    )


def test_the_verdict_without_an_evaluation_compares_the_ends_that_do_not_overlap(
    tmp_path: Path,
) -> None:
    ppo(tmp_path, [0.0, 1.0])
    assert verdict(read(tmp_path)).startswith("PPO's reward went from 0.00 to 1.00 in 2 iterations")
    ppo(tmp_path, [1.0])
    assert verdict(read(tmp_path)).startswith("PPO's reward is 1.00 in 1 iteration;")


def test_the_cost_counts_gpu_hours_where_there_were_gpus(tmp_path: Path) -> None:
    summary = {"seconds": {"gen": 1800, "total": 3600}, "num_gpus": 8}
    write(tmp_path, "ppo/summary.json", summary)
    assert card(cost(read(tmp_path)), "GPU-hours of PPO").value == "8"
    write(tmp_path, "ppo/summary.json", summary | {"num_gpus": 0})
    assert [each.title for each in cost(read(tmp_path))] == ["Time"]
    priced = {"cluster": {"gpu_hour_price": 2.5, "threads_per_actor": 2, "roles": {"policy": {}}}}
    write(tmp_path, "config.yaml", priced)
    span = {"ph": "X", "name": "learn", "pid": 1, "tid": 1, "ts": 0, "dur": 1, "args": {}}
    name = {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": "policy-0"}}
    write(tmp_path, "trace.json", name, span, {**span, "tid": 2})
    assert card(cost(read(tmp_path)), "Core-hours of PPO").value == "2"
    write(tmp_path, "ppo/summary.json", summary)
    assert card(cost(read(tmp_path)), "Price of PPO").value == "20"


@pytest.mark.parametrize("metric", ["objective/kl", "loss/policy_avg", "loss/value_avg"])
def test_a_loss_that_is_not_finite_in_the_last_iteration_is_divergence(
    metric: str, tmp_path: Path
) -> None:
    records = [{"iteration": i, "objective/scores": i, metric: 1.0} for i in range(8)]
    write(tmp_path, "ppo/metrics.jsonl", *records, {**records[-1], metric: None})
    found = card(outcomes(read(tmp_path)), "Training reward")
    assert found.tone == "bad"
    assert "PPO diverged" in found.sentence


def test_guards_that_are_off_or_stopped_the_run_are_said(tmp_path: Path) -> None:
    ppo(tmp_path, RISING)
    guards = {"loss_spike": {"action": "off"}, "ratio": {"action": "skip"}, "remind_every": 20}
    write(tmp_path, "config.yaml", {"guards": guards})
    found = card(grounds(read(tmp_path)), "Warnings of guards")
    assert found.tone == "doubt"
    assert "with loss spike switched off" in found.sentence
    write(tmp_path, "ppo/warnings.jsonl", {"guard": "mismatch", "iteration": 3, "action": "stop"})
    assert card(grounds(read(tmp_path)), "Warnings of guards").tone == "bad"


@pytest.mark.parametrize(("judge", "is_named"), [("reward", True), ("people", False)])
def test_a_win_rate_by_the_reward_that_ppo_was_trained_on_says_so(
    judge: str, is_named: bool, tmp_path: Path
) -> None:
    evaluated(tmp_path, 0.8, 0.7, 0.9, judge=judge)
    meaning = card(outcomes(read(tmp_path)), "Win rate against SFT").meaning
    assert ("which PPO was trained on" in meaning) is is_named


def test_the_ledger_of_a_run_that_has_not_ended_is_open(tmp_path: Path) -> None:
    write(tmp_path, "ppo/metrics.jsonl", {"iteration": 1, "objective/scores": 1.0, "episode": 64})
    found = card(grounds(read(tmp_path)), "Samples learnt")
    assert (found.value, found.tone) == ("64", "open")


@pytest.mark.parametrize(("accuracy", "tone"), [(0.7, "good"), (0.5, "bad")])
def test_a_reward_model_is_compared_with_chance(accuracy: float, tone: str, tmp_path: Path) -> None:
    write(tmp_path, "reward/summary.json", {"accuracy": accuracy})
    assert card(grounds(read(tmp_path)), "Reward model accuracy").tone == tone


@pytest.mark.parametrize(
    ("before", "after", "sentence", "tone"),
    [
        (0.25, 0.5, "It rose by 0.25.", "good"),
        (0.5, 0.25, "It fell by 0.25.", "bad"),
        (0.5, 0.5, "It did not change.", "doubt"),
        (None, 0.5, "SFT's was not measured.", ""),
    ],
)
def test_the_gold_score(
    before: float | None, after: float, sentence: str, tone: str, tmp_path: Path
) -> None:
    models = {"sft": {"gold_mean": before}, "ppo": {"gold_mean": after}}
    evaluated(tmp_path, 0.8, 0.7, 0.9, models=models)
    found = card(outcomes(read(tmp_path)), "Gold score, SFT → PPO")
    assert (found.sentence, found.tone) == (sentence, tone)
