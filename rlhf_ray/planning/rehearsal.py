"""What a rehearsal found out, and a plan that goes by it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import yaml

from rlhf_ray.config import Config, dump
from rlhf_ray.placement.layout import Node
from rlhf_ray.planning.memory import GB
from rlhf_ray.planning.memory_check import (
    Shortage,
    on_gpus,
    smallest_kind,
    together,
    usable_bytes,
)
from rlhf_ray.planning.prediction import Plan
from rlhf_ray.planning.roles import PlannedRole, state_bytes
from rlhf_ray.planning.throughput import SECONDS_PER_DAY, Pace, Range
from rlhf_ray.runs.folder import RunFolder

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
    gpus: Sequence[str]
    """See `gpus_of`."""
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


def gpus_of(nodes: Iterable[Node]) -> list[str]:
    """By which clusters are told apart: ``8 x A100-80GB`` for each node that has any."""
    return sorted(f"{node.gpus} x {node.gpu_kind}" for node in nodes if node.gpus)


def load(config: Config, nodes: Iterable[Node]) -> Rehearsal | None:
    """The rehearsal of this very config on such nodes; None: there was none that can be read."""
    try:
        text = (RunFolder(config).path / RESULT).read_text(encoding="utf-8")
        found = Rehearsal(**json.loads(text))
    except (OSError, ValueError, TypeError):  # none, no JSON, or of other keys
        return None
    is_its = _compared(found.config) == _compared(dump(config))
    return found if is_its and _may_be_same(found.gpus, gpus_of(nodes)) else None


def _may_be_same(these: Sequence[str], those: Sequence[str]) -> bool:
    """Whether nodes are alike, as far as it is known of what kind their GPUs are."""
    if not any(node.endswith(" x None") for node in (*these, *those)):
        return these == those
    numbers = [sorted(node.partition(" ")[0] for node in nodes) for nodes in (these, those)]
    return numbers[0] == numbers[1]


def _compared(config: str) -> dict[str, Any]:
    sections = yaml.safe_load(config)
    sections["ppo"] = {k: value for k, value in sections["ppo"].items() if k not in HOW_OFTEN}
    return {name: keys for name, keys in sections.items() if name not in NOT_COMPARED}


def calibrated(plan: Plan, rehearsal: Rehearsal) -> Plan:
    """The plan with measured seconds, and what measured memory says against it.

    Calls were in time: deadlines are among what a rehearsal is compared by.
    """
    notes, short = [], []
    for role in plan.roles:
        peak, planned = rehearsal.peak_of(role.role), _planned(plan, role)
        if peak is None:
            continue
        in_use = f"{_gb(peak)} were in use where {role.role} is, in the rehearsal"
        if peak > planned:
            notes.append(f"{in_use}: more than the {_gb(planned)} planned")
        usable = _usable(plan, role)
        if usable is not None and peak > usable:
            reason = f"{in_use}, and its GPU has {_gb(usable)} for tensors"
            short.append(Shortage(reason, peak - usable))
    return replace(
        plan,
        pace=calibrated_pace(plan.pace, rehearsal, plan.config),
        late_calls=None,
        assumptions=(*notes, *plan.assumptions),
        shortages=(*plan.shortages, *short),
    )


def _planned(plan: Plan, role: PlannedRole) -> float:
    """Bytes where its largest worker is: of its process, or of all on the same GPU."""
    sharing = on_gpus(plan.roles, plan.places).values()
    turns = plan.config.placement.turns
    return max((together(held, turns) for held in sharing if role in held), default=role.peak)


def _usable(plan: Plan, role: PlannedRole) -> float | None:
    """Of its smallest GPU, for tensors; None: it has none, or one that is not known."""
    kind = smallest_kind(plan.nodes[p.node] for p in plan.places if p.gpus and p.role == role.role)
    return None if kind is None else usable_bytes(kind)


def calibrated_pace(pace: Pace | None, rehearsal: Rehearsal, config: Config) -> Pace:
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
    lines = ["", f"{'role':<12}{'planned':>12}{'peak':>12}  (a process; all on its GPU)"]
    for role in plan.roles:
        peak = rehearsal.peak_of(role.role)
        if peak is not None:
            lines.append(f"{role.role:<12}{_gb(_planned(plan, role)):>12}{_gb(peak):>12}")
    lines += ["", f"{'phase':<12}{'predicted':>20}{'measured':>12}"]
    for phase, seconds in rehearsal.seconds.items():
        known = plan.pace.phases.get(phase) if plan.pace else None
        ends = f"{known[0]:.3g} to {known[1]:.3g} s" if known else "not known"
        lines.append(f"{phase:<12}{ends:>20}{f'{seconds:.3g} s':>12}")
    state = state_bytes(plan.config, plan.models)
    moved = {
        "sync": (plan.bytes_per_sync, "bytes a generator"),
        "commit": (state, "bytes"),
        "save": (state, "bytes"),
    }
    lines.append("")
    for phase, (num_bytes, what) in moved.items():
        if seconds := rehearsal.seconds.get(phase):
            rate = num_bytes / seconds / 1e6
            lines.append(f"{phase}: {num_bytes:,.0f} {what} in {seconds:.3g} s, {rate:,.3g} MB/s")
    lines.append(
        f"{rehearsal.samples} rollouts learnt; a generator was killed, "
        f"{rehearsal.generator_restarts} came back"
    )
    return "\n".join(lines)


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / GB:,.2f} GB"
