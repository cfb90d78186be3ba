"""Steps 6 and 7: whole PPO runs with all roles on one GPU, the large one compared with its plan."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import rlhf_ray
from gpu_checks.lines import Line, Place, checked, goal
from gpu_checks.models import MAX_LENGTH, large, prompts, reward_model, small
from rlhf_ray.config import Config, resolve
from rlhf_ray.observability.sinks import read_jsonl
from rlhf_ray.planning.plan import prediction_for
from rlhf_ray.planning.rehearsal import Rehearsal, planned_bytes
from rlhf_ray.planning.role_times import ASSUMPTIONS
from rlhf_ray.stages import rehearse

MEMORY_GOAL, SECONDS_GOAL = 0.15, 0.25
"""Largest difference from the plan, as a share of it."""
MFU = "learners, share of the GPU's peak bf16 FLOP/s (MFU)"
LARGE = {
    "policy": {"gradient_checkpointing": True},
    "critic": {"gradient_checkpointing": True},
    "reference": {"kind": "policy_base"},
    "lora": {"r": 32},
    "rollout": {
        "max_prompt_tokens": 256,
        "max_tokens": 256,
        "shard_size": 32,
        "engine_args": {"gpu_memory_utilization": 0.4},
    },
    "ppo": {"batch_size": 64, "mini_batch_size": 32},
}
"""What the small run's config lacks."""


def two_iterations(place: Place) -> Iterator[Line]:
    """Run two iterations of PPO with five roles, all on one GPU."""
    yield ran(config_of(place, "five-roles", small(place)), "two iterations of PPO, five roles")


def ran(config: Config, what: str) -> Line:
    """Run PPO, and check what its summary says."""
    rlhf_ray.run(config)
    summary, records = results(config)
    return checked(
        what,
        summary["samples_learnt"] == summary["samples_generated"],
        iterations=summary["iterations"],
        samples_learnt=summary["samples_learnt"],
        generator_restarts=summary["generator_restarts"],
        mismatch_nats=max(record["sampler/gap_mean"] for record in records),
        iteration_s=min(record["timing_s/iteration"] for record in records),
    )


def against_plan(place: Place) -> Iterator[Line]:
    """Run two iterations of the longest rollouts; compare memory and seconds with the plan."""
    config = config_of(place, "7b-run", large(place), LARGE if place.has_gpu else {})
    yield from compared(place, config, rehearse.run(config, kills=False))


def compared(place: Place, config: Config, measured: Rehearsal | None) -> Iterator[Line]:
    """Compare a rehearsal with the plan of its config."""
    assert measured is not None
    plan = prediction_for(config)
    for role in plan.roles:
        peak = measured.peak_of(role.role)
        if peak is not None and (role.gpus or not place.has_gpu):
            planned = planned_bytes(plan, role)
            yield goal(
                place,
                f"peak memory where {role.role} is, within {MEMORY_GOAL:.0%} of the plan",
                abs(peak / planned - 1) < MEMORY_GOAL,
                planned_gb=planned / 1e9,
                measured_gb=peak / 1e9,
            )
    phases = plan.time.phases if plan.time else {}
    seconds = {name: s for name, s in measured.seconds.items() if name != "save"}
    best, worst = (sum(phases[name][end] for name in phases if name in seconds) for end in (0, 1))
    iteration = sum(seconds.values())
    yield goal(
        place,
        f"seconds of an iteration, within {SECONDS_GOAL:.0%} of the planned range",
        best * (1 - SECONDS_GOAL) < iteration < worst * (1 + SECONDS_GOAL),
        planned_best_s=best,
        planned_worst_s=worst,
        measured_s=iteration,
        **{f"{name}_s": each for name, each in seconds.items()},
    )
    share = ASSUMPTIONS[MFU][0] * phases["learn"][0] / seconds["learn"] if phases else None
    yield goal(
        place,
        "the learners' share of peak FLOP/s is at least the assumed",
        share is None or share > min(ASSUMPTIONS[MFU]),
        share=share,
        assumed="{} to {}".format(*reversed(ASSUMPTIONS[MFU])),
    )


def config_of(place: Place, name: str, base: str, *more: Mapping[str, Any]) -> Config:
    """Make a config of PPO alone over a base, its roles on one GPU unless ``more`` says else."""
    values: dict[str, Any] = {
        "run": {
            "name": name,
            "dir": str(place.folder / "runs" / name),
            "stages": ["ppo"],
            "resume": "never",
        },
        "cluster": {"mode": "local"},
        "placement": {"gpus": 0.2},
        "model": {"path": base, "dtype": "bfloat16", "max_length": MAX_LENGTH},
        "reward": {"path": reward_model(place, base)},
        "data": {"prompts": {"path": prompts(place)}},
        "ppo": {"iterations": 2, "batch_size": 16, "mini_batch_size": 8, "epochs": 1},
        "rollout": {"max_prompt_tokens": 64, "max_tokens": 32, "shard_size": 4},
    }
    if place.has_gpu:
        values["rollout"]["engine_args"] = {"gpu_memory_utilization": 0.2}
    for sections in more:
        for section, keys in sections.items():
            values[section] = values.get(section, {}) | keys
    return resolve(values)


def results(config: Config) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the summary and the metrics of a finished run."""
    folder = Path(config.run.dir) / "ppo"
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary, read_jsonl(folder / "metrics.jsonl")
