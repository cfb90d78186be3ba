"""Results of the proof's runs, and the claims that they must meet."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from proof.faults import FAULTS
from proof.runs import CAUGHT, EXPERIMENTS, Job

SAME = 1e-4
SAME_CURVE_CLAIMS = {
    "policy_base": "the adapter switched off, the policy stays the reference: largest difference",
    "ray": "Ray actors give the curve of one process: largest difference",
}
METRICS = {"objective/scores": "reward", "objective/kl": "KL, nats a response"}
ROW_NUMBERS = ("reward_first", "reward_last", "kl_last", "kl_max")
RISE = dict.fromkeys(
    ["beta_0.02", "rloo", "grpo", "staleness_1", "staleness_2", "token_count", "sentiment"], 0.5
)
"""Least rise of the reward, in units of its source."""


def row_of(job: Job) -> dict[str, Any]:
    """The job's row of summary.json."""
    summary = _read(job.folder / "ppo" / "summary.json")
    caught = job.base / f"{job.name}{CAUGHT}" / CAUGHT
    return {
        "experiment": job.name,
        "seed": job.seed,
        "reward_first": summary["reward_first"],
        "reward_last": summary["reward_last"],
        "kl_last": summary["kl_last"],
        "kl_max": max(_curve(job, "objective/kl")),
        "detector_fired": caught.is_file() if job.name in FAULTS else _hacking_seen(summary),
        "reward_accuracy": _read(job.base / "base" / "reward" / "summary.json")["accuracy"],
    }


def _hacking_seen(summary: Mapping[str, Any]) -> bool:
    return bool(summary["guards"]["repetition"])


def _curve(job: Job, metric: str) -> list[float]:
    lines = (job.folder / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)[metric] for line in lines]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Claim:
    """A claim that must hold for every seed."""

    text: str
    figures: Sequence[str]
    """One a seed, as it is shown."""
    holds: bool


def claims_of(rows: Sequence[Mapping[str, Any]]) -> Iterator[Claim]:
    """Return the recipe's claims, by experiment."""
    by_name = {name: [row for row in rows if row["experiment"] == name] for name in EXPERIMENTS}

    def of(name: str, key: str) -> list[float]:
        return [float(row[key]) for row in by_name[name]]

    def rise(name: str) -> list[float]:
        return [row["reward_last"] - row["reward_first"] for row in by_name[name]]

    def every(text: str, figures: Sequence[float], holds: Callable[[float], bool]) -> Claim:
        return Claim(text, list(map(_shown, figures)), all(map(holds, figures)))

    def detector(text: str, name: str, *, fires: bool) -> Claim:
        fired = [row["detector_fired"] for row in by_name[name]]
        return Claim(text, list(map(_word, fired)), all(each == fires for each in fired))

    yield every(
        "accuracy of the reward model within .65 and .73",
        of("beta_0.2", "reward_accuracy"),
        lambda accuracy: 0.65 <= accuracy <= 0.73,
    )
    yield every("β=.2: reward rises by .5", rise("beta_0.2"), lambda figure: figure >= 0.5)
    yield every("β=.2: last KL within .3 and 4", of("beta_0.2", "kl_last"), lambda kl: 0.3 < kl < 4)
    healthy, hacked = of("beta_0.2", "reward_last"), of("beta_0", "reward_last")
    more = [theirs - ours for ours, theirs in zip(healthy, hacked, strict=True)]
    yield every("β=0: more reward than β=.2, by", more, lambda figure: figure > 0)
    kls = zip(of("beta_0", "kl_last"), of("beta_0.2", "kl_last"), strict=True)
    yield every("β=0: KL over that of β=.2", [a / b for a, b in kls], lambda ratio: ratio >= 20)
    yield detector("β=0: the detector fires", "beta_0", fires=True)
    yield detector("β=.2: the detector is silent", "beta_0.2", fires=False)
    for name, least in RISE.items():
        text = f"{name}: reward rises by {least:g}"
        yield every(text, rise(name), lambda figure, least=least: figure >= least)
    for name in FAULTS:
        yield detector(f"{name}: caught", name, fires=True)


def same_curves(jobs: Sequence[Job]) -> Iterator[Claim]:
    """Largest difference from `beta_0.2`'s rewards and KLs."""
    oracle = next(job for job in jobs if job.name == "beta_0.2")
    for name, text in SAME_CURVE_CLAIMS.items():
        job = next(job for job in jobs if job.name == name)
        differences = [
            abs(ours - theirs)
            for metric in ("objective/scores", "objective/kl", "loss/value_avg")
            for ours, theirs in zip(_curve(job, metric), _curve(oracle, metric), strict=False)
        ]
        yield Claim(text, [_shown(max(differences))], max(differences) < SAME)


def write(out: Path, rows: Sequence[Mapping[str, Any]], claims: Sequence[Claim]) -> None:
    (out / "summary.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    (out / "claims.md").write_text("\n".join(_table(rows, claims)) + "\n", encoding="utf-8")


def _table(rows: Sequence[Mapping[str, Any]], claims: Sequence[Claim]) -> Iterator[str]:
    """Markdown: the claims, then the runs."""
    yield "| claim | seeds | holds |"
    yield "|---|---|---|"
    for claim in claims:
        figures = " / ".join(claim.figures)
        yield f"| {claim.text} | {figures} | {'yes' if claim.holds else '**no**'} |"
    yield ""
    yield "| run | seed | reward, first 5 | last 5 | KL, last 5 | KL, most | detector |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        fired = _word(row["detector_fired"])
        numbers = " | ".join(f"{row[key]:.2f}" for key in ROW_NUMBERS)
        yield f"| {row['experiment']} | {row['seed']} | {numbers} | {fired} |"


def _shown(figure: float) -> str:
    return f"{figure:.3g}"


def _word(fired: bool) -> str:
    return "fired" if fired else "silent"


def draw(jobs: Sequence[Job], path: Path) -> None:
    """Reward and KL by iteration: a line an experiment, mean over seeds, and the span of seeds."""
    figure, panels = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    groups = (("beta_0.2", "beta_0.02", "beta_0"), ("rloo", "grpo", "token_count", "sentiment"))
    for column, names in enumerate(groups):
        for row, (metric, label) in enumerate(METRICS.items()):
            for name in names:
                several = [_curve(job, metric) for job in jobs if job.name == name]
                curves = np.array(several)
                steps = np.arange(1, curves.shape[1] + 1)
                (line,) = panels[row, column].plot(steps, curves.mean(0), label=name)
                low, high = curves.min(0), curves.max(0)
                panels[row, column].fill_between(
                    steps, low, high, color=line.get_color(), alpha=0.2
                )
            panels[row, column].set(xlabel="iteration", ylabel=label)
            panels[row, column].legend(frameon=False)
    for panel in panels[1]:
        panel.set_yscale("symlog", linthresh=1)
    figure.savefig(path)
