"""The top of the report: each card says what the files say, and what they do not say."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.report.data import read
from rlhf_ray.report.story import Card, cost, grounds, outcomes, trained, verdict

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
        ([0.0, 0.1, 0.9, 1.0], "0.05 → 0.95", "It rose over 4 iterations.", "good"),
        ([1.0, 0.9, 0.1, 0.0], "0.95 → 0.05", "It fell over 4 iterations.", "bad"),
        ([0.0, 1.0, 0.1, 1.0], "0.5 → 0.55", "did not move beyond its own spread", "doubt"),
        ([0.5, 0.7], "0.5 → 0.7", "It rose over 2 iterations.", "good"),
        ([0.5], "0.5", "One iteration is too few", "open"),
        ([0.5, None], "–", "not finite in the last iteration; 1 others", "bad"),
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
    ],
)
def test_the_win_rate(
    rate: float, low: float, high: float, sentence: str, tone: str, tmp_path: Path
) -> None:
    evaluated(tmp_path, rate, low, high)
    found = card(outcomes(read(tmp_path)), "Win rate against SFT")
    assert (found.value, found.tone) == (f"{rate:.2f}", tone)
    assert found.sentence.startswith(sentence)
    assert found.sentence.endswith("from 200 prompts.")


def test_an_evaluation_of_an_older_version_and_a_missing_one_are_said(tmp_path: Path) -> None:
    write(tmp_path, "ppo/summary.json", {"adapter_version": 9})
    missing = card(outcomes(read(tmp_path)), "Win rate against SFT")
    assert (missing.value, missing.tone) == ("–", "open")
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
        ({"learnt": 56, "discarded": 8}, "None was learnt twice; the rest: 8 discarded.", "good"),
        ({"learnt": 60}, "4 are not accounted for", "bad"),
        ({"learnt": 70}, "6 are not accounted for", "bad"),
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
