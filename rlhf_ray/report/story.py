"""The top of the report: what was trained, whether it got better, whether to trust it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev
from typing import Literal

from rlhf_ray.report import evaluation
from rlhf_ray.report.data import Record, RunFiles, number
from rlhf_ray.report.sections import figure
from rlhf_ray.report.texts import model_title

Tone = Literal["good", "doubt", "bad", "open", ""]
"""What a card says for the run: open: it cannot be told yet; empty: nothing either way."""

ENDS = 5
"""Iterations at either end of a run whose means are compared, at most half of them."""
NEAR, FAR = 0.05, 20.0
"""KL to the reference, nats an answer, below which nothing was learnt and above which it is far."""
_FEWEST = 4
"""Iterations from which a trend is told from noise."""
_FINITE = {
    "objective/scores": "the reward",
    "objective/kl": "the KL",
    "loss/policy_avg": "the policy's loss",
    "loss/value_avg": "the critic's loss",
}
"""Metrics that training has diverged without."""
_DONE = {
    "pretrain": "pretraining",
    "sft": "supervised fine-tuning",
    "reward": "a reward model",
    "dpo": "DPO",
}


@dataclass(frozen=True)
class Card:
    """A key number and what it says."""

    title: str
    value: str
    sentence: str
    """What the number says of this run, or what it is."""
    meaning: str = ""
    """What the number is, where the sentence does not say it."""
    tone: Tone = ""


def trained(files: RunFiles) -> str:
    """Return what was trained, in sentences; empty without a config."""
    if not files.config:
        return ""
    parts = [name for stage, name in _DONE.items() if stage in files.summaries]
    iterations = len(files.metrics.get("ppo", ()))
    if iterations:
        rank, rollouts = files.option("lora.r"), files.option("ppo.batch_size")
        parts.append(
            f"{iterations} of {files.option('ppo.iterations')} iterations of PPO with {rollouts} "
            f"rollouts each, as a LoRA adapter of rank {rank}"
        )
    model = files.option("model.path") or "A tiny Llama built from the config"
    said = f"{model} went through {_listed(parts)}." if parts else f"{model} is to be trained."
    if (verdicts := number(files.summaries.get("rank"), "answers")) is not None:
        people = number(files.summaries.get("rank"), "people") or 0
        said += f" {_count(people, 'person', 'people')} gave {verdicts:,.0f} verdicts on its pairs."
    if files.origin:
        origin, version = files.origin.get("run", "–"), files.origin.get("version", "–")
        said += f" It is a branch of the run {origin}, from its version {version}."
    return said


def verdict(files: RunFiles) -> str:
    """Return the run's outcome as a sentence."""
    if win_rate := evaluation.win_rate(files):
        rate, low, high = win_rate
        name = model_title(evaluation.final_model(files))
        if low > 0.5:
            outcome = f"{name} beats SFT on held-out questions"
        elif high < 0.5:
            outcome = f"{name} loses to SFT on held-out questions"
        elif rate == low == high:
            return f"{name} and SFT tie on every held-out question."
        else:
            outcome = f"{name} and SFT do not differ significantly on held-out questions"
        return f"{outcome}: win rate {rate:.2f} (95% interval {low:.2f} to {high:.2f})."
    if known := _known(files, "objective/scores"):
        before, after = _ends(known)
        where = _count(len(files.metrics["ppo"]), "iteration", "iterations")
        course = f"went from {fmean(before):.2f} to" if before else "is"
        return (
            f"PPO's reward {course} {fmean(after):.2f} in {where}; it has not been evaluated "
            "against SFT."
        )
    done = ", ".join(files.summaries)
    return f"Finished so far: {done}." if done else "No stage has finished yet."


def outcomes(files: RunFiles) -> list[Card]:
    """Return the cards that say whether it got better."""
    return [*_reward(files), *_win_rate(files), *_held_out(files)]


def grounds(files: RunFiles) -> list[Card]:
    """Return the cards that say whether the outcome is to be trusted."""
    return [*_kl(files), *_guards(files), *_ledger(files), *_reward_model(files)]


def _reward(files: RunFiles) -> Iterator[Card]:
    known, records = _known(files, "objective/scores"), files.metrics.get("ppo", ())
    title = "Training reward"
    if not known:
        if records:
            yield Card(title, "–", "No iteration has a finite reward: PPO diverged.", tone="bad")
        return
    before, after = _ends(known)
    meaning = (
        f"Mean score of the rollouts of the last {len(after)} iterations"
        + (f", and of the first {len(before)}" if before else "")
        + ". It is what PPO maximises, so it says less than the comparison on held-out prompts."
    )
    value = f"{figure(fmean(before))} → {figure(fmean(after))}" if before else figure(known[0])
    change = fmean(after) - fmean(before) if before else 0.0
    where = f"over {_count(len(records), 'iteration', 'iterations')}"
    tone: Tone
    if odd := _not_finite(files):
        sentence, tone = f"PPO diverged: {odd} is not finite in the last iteration.", "bad"
    elif len(known) < _FEWEST:
        few = "One iteration is" if not before else f"{len(known)} iterations are"
        sentence, tone = f"{few} too few to tell a trend from noise.", "open"
    elif abs(change) <= 2 * _error(known, len(after)):
        sentence, tone = f"It did not move beyond its own spread {where}.", "doubt"
    else:
        sentence = f"It {'rose' if change > 0 else 'fell'} {where}."
        tone = "good" if change > 0 else "bad"
    yield Card(title, value, sentence, meaning, tone)


def _win_rate(files: RunFiles) -> Iterator[Card]:
    title, policy = "Win rate against SFT", files.summaries.get("ppo")
    measured = evaluation.win_rate(files)
    if measured is None:
        if policy or "dpo" in files.summaries or "ppo" in files.metrics:
            sentence = "Nothing was compared on held-out prompts: run the stage evaluate."
            yield Card(title, "–", sentence, tone="open")
        return
    rate, low, high = measured
    summary, name = files.summaries["evaluate"], model_title(evaluation.final_model(files))
    if low > 0.5:
        sentence, tone = f"{name}'s answers are better than SFT's.", "good"
    elif high < 0.5:
        sentence, tone = f"{name}'s answers are worse than SFT's.", "bad"
    else:
        sentence, tone = f"Too close to tell {name} from SFT.", "doubt"
    num = number(summary, "num_prompts")
    of = "" if num is None else f", from {num:,.0f} prompts"
    if rate == low == high == 0.5:
        sentence = f"{name} and SFT tie on every prompt, so there is no interval."
    else:
        sentence += f" 95% interval {low:.2f} to {high:.2f}{of}."
    version, newest = number(summary, "policy_version"), number(policy, "adapter_version")
    if version is not None and newest is not None and version < newest:
        sentence += f" This was version {version:.0f}; the policy is at {newest:.0f} by now."
        tone = "doubt" if tone == "good" else tone
    meaning = (
        "Share of held-out prompts on which its answer is the better one, ties counted half. "
        ".5 is as good as SFT; the gain is significant where the interval lies above it."
    )
    if (judge := summary.get("judge")) is not None:
        meaning += f" Judged by {evaluation.judge_title(str(judge))}"
        meaning += ", which PPO was trained on." if judge == "reward" else "."
    yield Card(title, f"{rate:.2f}", sentence, meaning, tone)


def _held_out(files: RunFiles) -> Iterator[Card]:
    summary, final = files.summaries.get("evaluate"), evaluation.final_model(files)
    for key, title, meaning in (
        (
            "gold_mean",
            "Gold score",
            "A hidden quality score that no model was trained on. If it rises, answers became "
            "better, not just better at pleasing the reward model.",
        ),
        ("reward_mean", "Held-out reward", "Mean reward of the answers to unseen questions."),
    ):
        before = number(summary, "models", "sft", key)
        after = number(summary, "models", final, key)
        if after is not None:
            change = 0.0 if before is None else after - before
            moved = "rose" if change > 0 else "fell" if change < 0 else "did not change"
            sentence = f"It {moved}{f' by {figure(abs(change))}' if change else ''}."
            value = f"{figure(before)} → {figure(after)}"
            tone: Tone = "good" if change > 0 else "bad" if change < 0 else "doubt"
            if before is None:
                sentence, tone = "SFT's was not measured.", ""
            yield Card(f"{title}, SFT → {model_title(final)}", value, sentence, meaning, tone)


def _kl(files: RunFiles) -> Iterator[Card]:
    known = _known(files, "objective/kl")
    if not known:
        return
    kl = fmean(_ends(known)[1])
    if kl < 0:
        sentence, tone = "Below zero, which no true KL is: see the warnings.", "bad"
    elif kl < NEAR:
        sentence, tone = "The policy has hardly moved from the SFT model.", "doubt"
    elif kl > FAR:
        sentence, tone = (
            "Far from the SFT model, as where a reward is gamed: read the samples at the largest "
            "KL.",
            "doubt",
        )
    else:
        sentence, tone = "The policy has moved, and stayed near the SFT model.", "good"
    meaning = (
        "How far the policy's answers are from what the frozen reference would write, a mean over "
        f"the last iterations. Below {NEAR:g} nothing was learnt; far above {FAR:g} the reward is "
        "often gamed."
    )
    yield Card("KL to the reference", f"{figure(kl)} nats", sentence, meaning, tone)


def _guards(files: RunFiles) -> Iterator[Card]:
    iterations = len(files.metrics.get("ppo", ()))
    if not iterations:
        return
    by_guard: dict[str, int] = {}
    for record in files.warnings:
        name = str(record.get("guard", "–")).replace("_", " ")
        by_guard[name] = by_guard.get(name, 0) + 1
    where = _count(iterations, "iteration", "iterations")
    if by_guard:
        last = files.warnings[-1].get("iteration", "–")
        names = _listed([f"{name} {_times(num)}" for name, num in by_guard.items()])
        sentence, tone = f"In {where} these warned: {names}, last in iteration {last}.", "doubt"
        if any(record.get("action") == "stop" for record in files.warnings):
            tone = "bad"
    elif off := _off(files):
        sentence, tone = f"None warned in {where}, with {_listed(off)} switched off.", "doubt"
    else:
        sentence, tone = f"None warned in {where}.", "good"
    meaning = (
        "Guards watch every iteration for gamed rewards, runaway ratios, negative KL, spikes of "
        "the loss, and engines that compute otherwise than the learner."
    )
    yield Card("Warnings of guards", f"{len(files.warnings):,}", sentence, meaning, tone)


def _off(files: RunFiles) -> list[str]:
    """Return the guards that are switched off."""
    guards = files.option("guards") or {}
    return [
        name.replace("_", " ") for name in guards if files.option(f"guards.{name}.action") == "off"
    ]


def _ledger(files: RunFiles) -> Iterator[Card]:
    summary = files.summaries.get("ppo")
    names = ("drawn", "learnt", "discarded", "filtered", "in_flight")
    counts = {name: number(summary, "ledger", name) for name in names}
    drawn, learnt = counts["drawn"], counts["learnt"]
    if drawn is None or learnt is None:
        if summary is None and (records := files.metrics.get("ppo", ())):
            sentence = "Learnt so far; the ledger is closed when PPO ends."
            learnt = number(records[-1], "episode")
            yield Card("Samples learnt", figure(learnt), sentence, tone="open")
        return
    others = {name: num for name, num in counts.items() if num and name not in ("drawn", "learnt")}
    missing = drawn - learnt - sum(others.values())
    if missing:
        fault = "are not accounted for" if missing > 0 else "are counted twice"
        sentence, tone = f"{abs(missing):,.0f} {fault}.", "bad"
    elif others:
        rest = _listed([f"{num:,.0f} {name.replace('_', ' ')}" for name, num in others.items()])
        sentence = f"None was learnt twice; the rest: {rest}."
        tone = "doubt" if counts["discarded"] else "good"
    else:
        sentence, tone = "Every sample that was drawn was learnt exactly once.", "good"
    meaning = (
        "The ledger counts each sample from its draw to what became of it, over restarts and "
        "rollbacks."
    )
    yield Card("Samples learnt", f"{learnt:,.0f} of {drawn:,.0f}", sentence, meaning, tone)


def _reward_model(files: RunFiles) -> Iterator[Card]:
    accuracy = number(files.summaries.get("reward"), "accuracy")
    if accuracy is not None:
        yield Card(
            "Reward model accuracy",
            f"{accuracy:.1%}",
            "It is no better than chance."
            if accuracy <= 0.5
            else "It tells the better of two held-out answers more often than chance.",
            "Share of held-out pairs in which it scores the better answer higher. "
            "50% is chance; noisy votes keep even a perfect model below 100%.",
            "bad" if accuracy <= 0.5 else "good",
        )
    measured = number(files.summaries.get("reward"), "benchmark", "accuracy")
    if measured is not None:
        yield Card(
            "Reward model on its benchmark",
            f"{measured:.1%}",
            "Share of the benchmark's pairs in which it scores the better answer higher.",
        )


def _known(files: RunFiles, metric: str) -> list[float]:
    """Return PPO's finite values of a metric, in order of the iterations."""
    records: Sequence[Record] = files.metrics.get("ppo", ())
    values = (number(record, metric) for record in records)
    return [value for value in values if value is not None]


def _ends(values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """Return the values at both ends, which do not overlap; of a single one the first is empty."""
    num = max(1, min(ENDS, len(values) // 2))
    return values[:num] if len(values) > 1 else (), values[-num:]


def _error(values: Sequence[float], num: int) -> float:
    """Return the standard error of the difference of two means over ``num`` values each.

    The spread is that of steps between neighbours, which a trend hardly widens.
    """
    return stdev(after - before for before, after in pairwise(values)) / math.sqrt(num)


def _not_finite(files: RunFiles) -> str:
    """Return what is not finite in PPO's last iteration; empty if all is."""
    last = files.metrics.get("ppo", ())[-1:]
    names = (name for record in last for name in _FINITE if name in record)
    return _listed([_FINITE[name] for name in names if number(last[0], name) is None] or [""])


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _times(num: int) -> str:
    return "once" if num == 1 else f"{num:,} times"


def _count(num: float, one: str, several: str) -> str:
    return f"{num:,.0f} {one if num == 1 else several}"
