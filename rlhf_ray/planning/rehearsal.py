"""A rehearsal's measurements, and a plan calibrated with them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import yaml

from rlhf_ray.config import Config, dump
from rlhf_ray.disk import DAMAGE
from rlhf_ray.placement.layout import Node
from rlhf_ray.planning.memory import gb
from rlhf_ray.planning.prediction import (
    Plan,
    Shortage,
    on_gpus,
    smallest_kind,
    together,
    usable_bytes,
)
from rlhf_ray.planning.role_times import Range
from rlhf_ray.planning.roles import PlannedRole, state_bytes
from rlhf_ray.planning.throughput import SECONDS_PER_DAY, TimeEstimate, save_seconds
from rlhf_ray.runs.folder import RunFolder

RESULT = "rehearsal.json"
"""File in the run's folder."""

ITERATIONS = 2
NOT_COMPARED = ("run", "guards", "trackers", "evaluate")
"""Sections that change neither memory nor time, ..."""
PPO_NOT_COMPARED = ("iterations", "save_every", "eval_every", "keep_checkpoints", "keep_adapters")
"""... and such keys of ppo."""


@dataclass(frozen=True)
class Rehearsal:
    """Measurements of two iterations at the worst case."""

    when: str
    config: str
    """The run's config, as YAML."""
    gpus: Sequence[str]
    """See `gpus_of`."""
    seconds: Mapping[str, float]
    """Phase -> seconds of one iteration."""
    peak_memory_bytes: Mapping[str, int]
    """Worker -> its peak."""
    samples: int
    """Samples that were learnt."""
    generator_restarts: int

    def as_mapping(self) -> dict[str, object]:
        """Return the content of the result file."""
        return asdict(self)

    def peak_of(self, role: str) -> int | None:
        """Return the peak of the role's largest worker; None if it had no worker."""
        peaks = [b for name, b in self.peak_memory_bytes.items() if name.startswith(f"{role}-")]
        return max(peaks, default=None)


def worst_keys(config: Config) -> dict[str, dict[str, object]]:
    """Return section -> keys that a rehearsal sets for the worst case."""
    off = {"action": "off"}
    return {
        "ppo": {
            "iterations": ITERATIONS,
            "save_every": 1,
            "eval_every": ITERATIONS,
            "missing_eos_penalty": 0.0,
            "overlong": {"truncated": "score"},
            "critic_warmup": 0,
            "warmup_iterations": 0,
            "filter_groups": {"max_refills": 0},
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
    """Return what identifies a cluster: ``8 x A100-80GB`` for each node with GPUs."""
    return sorted(f"{node.gpus} x {node.gpu_kind}" for node in nodes if node.gpus)


def load(config: Config, nodes: Iterable[Node]) -> Rehearsal | None:
    """Return the rehearsal of this config on such nodes; None if missing or unreadable."""
    try:
        text = (RunFolder(config).path / RESULT).read_text(encoding="utf-8")
        rehearsal = Rehearsal(**json.loads(text))
        is_same = _compared(rehearsal.config) == _compared(dump(config))
    except (*DAMAGE, OSError, yaml.YAMLError):  # missing, or written by another version
        return None
    return rehearsal if is_same and _may_be_same(rehearsal.gpus, gpus_of(nodes)) else None


def _may_be_same(these: Sequence[str], those: Sequence[str]) -> bool:
    """True if clusters are alike, as far as the kinds of their GPUs are known."""
    if not any(node.endswith(" x None") for node in (*these, *those)):
        return these == those
    numbers = [sorted(node.partition(" ")[0] for node in nodes) for nodes in (these, those)]
    return numbers[0] == numbers[1]


def _compared(config: str) -> dict[str, object]:
    """Return the parts of a config that a rehearsal depends on."""
    sections = yaml.safe_load(config)
    sections["ppo"] = {
        k: value for k, value in sections["ppo"].items() if k not in PPO_NOT_COMPARED
    }
    return {name: keys for name, keys in sections.items() if name not in NOT_COMPARED}


def calibrated(plan: Plan, rehearsal: Rehearsal) -> Plan:
    """Return the plan with measured seconds, and with shortages that measured memory shows.

    Its calls were in time: the deadlines of the rehearsed config are the same.
    """
    notes, shortages = [], []
    for role in plan.roles:
        peak, planned = rehearsal.peak_of(role.role), planned_bytes(plan, role)
        if peak is None:
            continue
        in_use = f"{gb(peak)} were in use where {role.role} is, in the rehearsal"
        if peak > planned:
            notes.append(f"{in_use}: more than the planned {gb(planned)}")
        usable = _usable(plan, role)
        if usable is not None and peak > usable:
            reason = f"{in_use}, and its GPU has {gb(usable)} for tensors"
            shortages.append(Shortage(reason, peak - usable))
    return replace(
        plan,
        time=calibrated_time(plan.time, rehearsal, plan.config),
        late_calls=None,
        assumptions=(*notes, *plan.assumptions),
        shortages=(*plan.shortages, *shortages),
        confirmed_by=f"the rehearsal of {rehearsal.when}",
    )


def planned_bytes(plan: Plan, role: PlannedRole) -> float:
    """Return the planned bytes of its process, or of all processes on its GPU."""
    sharing = on_gpus(plan.roles, plan.places).values()
    turns = plan.config.placement.turns
    return max((together(held, turns) for held in sharing if role in held), default=role.peak)


def _usable(plan: Plan, role: PlannedRole) -> float | None:
    """Return the usable bytes of its smallest GPU; None without GPUs or of an unknown kind."""
    kind = smallest_kind(plan.nodes[p.node] for p in plan.places if p.gpus and p.role == role.role)
    return None if kind is None else usable_bytes(kind)


def calibrated_time(
    predicted: TimeEstimate | None, rehearsal: Rehearsal, config: Config
) -> TimeEstimate:
    """Return measured seconds as the worst case; the best is better by the predicted ratio."""
    phases: dict[str, Range] = {}
    for name, worst in rehearsal.seconds.items():
        if name == "save":  # beside the iteration
            continue
        best, slowest = (
            predicted.phases[name] if predicted and name in predicted.phases else (1.0, 1.0)
        )
        phases[name] = (worst * best / slowest if slowest else worst, worst)
    known = predicted or TimeEstimate({}, (0.0, 0.0), 0.0)
    before, after = known.iteration, TimeEstimate(phases, (0.0, 0.0), 0.0).iteration
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
    """Return a table of measured against planned memory and time; ``plan`` is not calibrated."""
    lines = ["", f"{'role':<12}{'planned':>12}{'peak':>12}  (a process; all on its GPU)"]
    for role in plan.roles:
        peak = rehearsal.peak_of(role.role)
        if peak is not None:
            lines.append(f"{role.role:<12}{gb(planned_bytes(plan, role)):>12}{gb(peak):>12}")
    lines += ["", f"{'phase':<12}{'predicted':>20}{'measured':>12}"]
    beside = {"save": save_seconds(plan.config, plan.models)}
    predicted = {**plan.time.phases, **beside} if plan.time else {}
    for phase, seconds in rehearsal.seconds.items():
        known = predicted.get(phase)
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
