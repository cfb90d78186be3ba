"""What a rehearsal found out, and a plan that goes by it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import yaml

from rlhf_ray.config import Config, dump
from rlhf_ray.models.memory import GB
from rlhf_ray.stages.plan.pace import SECONDS_PER_DAY, Pace, Range
from rlhf_ray.stages.plan.prediction import Plan
from rlhf_ray.stages.run_folder import RunFolder

RESULT = "rehearsal.json"
"""In the run's folder."""

ITERATIONS = 2
NOT_COMPARED = ("run", "guards", "trackers", "evaluate")
"""Sections that change neither memory nor pace, ..."""
HOW_OFTEN = ("iterations", "save_every", "eval_every", "keep_checkpoints")
"""... and keys of ppo."""


@dataclass(frozen=True)
class Rehearsal:
    """Two iterations at the worst case."""

    when: str
    config: str
    """Of the run, as YAML."""
    seconds: Mapping[str, float]
    """By phase, of one iteration."""
    peak_memory_bytes: Mapping[str, int]
    """By worker."""
    samples: int
    """Learnt, of those generated."""
    generator_restarts: int

    def as_mapping(self) -> dict[str, Any]:
        """As it is written."""
        return asdict(self)

    def peak_of(self, role: str) -> int | None:
        """Of the role's largest worker; None: it had none."""
        peaks = [b for name, b in self.peak_memory_bytes.items() if name.startswith(f"{role}-")]
        return max(peaks, default=None)


def worst_keys(config: Config) -> dict[str, dict[str, Any]]:
    """Section -> what a rehearsal sets in it."""
    off = {"action": "off"}
    return {
        "ppo": {
            "iterations": ITERATIONS,
            "save_every": 1,
            "eval_every": ITERATIONS,
            "missing_eos_penalty": 0.0,
        },
        "rollout": {
            "ignore_eos": True,
            "length_sampler": None,
            "min_tokens": 0,
            "stop": [],
            "autoscale": None,
        },
        "generators": {"max_restarts": max(1, config.generators.max_restarts)},
        "guards": dict.fromkeys(("repetition", "negative_kl", "ratio", "loss_spike"), off),
    }


def load(config: Config) -> Rehearsal | None:
    """The rehearsal of this very config; None: there was none."""
    path = RunFolder(config).path / RESULT
    if not path.is_file():
        return None
    found = Rehearsal(**json.loads(path.read_text(encoding="utf-8")))
    return found if _compared(found.config) == _compared(dump(config)) else None


def _compared(config: str) -> dict[str, Any]:
    sections = yaml.safe_load(config)
    sections["ppo"] = {k: value for k, value in sections["ppo"].items() if k not in HOW_OFTEN}
    return {name: keys for name, keys in sections.items() if name not in NOT_COMPARED}


def calibrated(pace: Pace | None, rehearsal: Rehearsal, config: Config) -> Pace:
    """Seconds as they were measured: the worst case; the best is as much better as was predicted.

    Args:
        pace: the prediction; None: how fast the machine is was not known.
        rehearsal: on the same machines.
        config: of the run, which saves less often.
    """
    phases: dict[str, Range] = {}
    for name, measured in rehearsal.seconds.items():
        worst = measured / config.ppo.save_every if name == "save" else measured
        best, slowest = pace.phases[name] if pace and name in pace.phases else (1.0, 1.0)
        phases[name] = (worst * best / slowest if slowest else worst, worst)
    known = pace or Pace({}, (0.0, 0.0), 0.0)
    before, after = known.iteration, Pace(phases, (0.0, 0.0), 0.0).iteration
    saved = [
        known.days[end] + config.ppo.iterations * (after[end] - before[end]) / SECONDS_PER_DAY
        for end in (0, 1)
    ]
    slower = sum(after) / sum(before) if sum(before) else 1.0
    return replace(
        known,
        phases=phases,
        days=(saved[0], saved[1]),
        idle_gpu_hours=known.idle_gpu_hours * slower,
    )


def as_text(rehearsal: Rehearsal, plan: Plan) -> str:
    """What was measured beside what is planned.

    Args:
        rehearsal: what was measured.
        plan: of the same config, not calibrated.
    """
    lines = ["", f"{'role':<12}{'planned':>12}{'peak':>12}  (a process)"]
    for role in plan.roles:
        peak = rehearsal.peak_of(role.role)
        if peak is not None:
            lines.append(f"{role.role:<12}{_gb(role.peak):>12}{_gb(peak):>12}")
    lines += ["", f"{'phase':<12}{'predicted':>20}{'measured':>12}"]
    for phase, seconds in rehearsal.seconds.items():
        known = plan.pace.phases.get(phase) if plan.pace else None
        ends = f"{known[0]:.3g} to {known[1]:.3g} s" if known else "not known"
        lines.append(f"{phase:<12}{ends:>20}{f'{seconds:.3g} s':>12}")
    if seconds := rehearsal.seconds.get("sync"):
        rate = plan.bytes_per_sync / seconds / 1e6
        lines += ["", f"sync: {plan.bytes_per_sync:,} bytes a generator, {rate:,.3g} MB/s"]
    lines.append(
        f"{rehearsal.samples} rollouts learnt; a generator was killed, "
        f"{rehearsal.generator_restarts} came back"
    )
    return "\n".join(lines)


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / GB:,.2f} GB"
