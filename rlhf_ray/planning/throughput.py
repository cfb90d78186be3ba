"""Estimate how long an iteration takes: phases in sequence, each as long as its slowest GPU works.

A prediction with stated ranges, not a measurement. The phases are those of `driver.ppo_loop`:
policy and critic learn at the same time, and scores of a shard are computed while others are
sampled. With `ppo.max_staleness` generators that have GPUs of their own sample beside all other
phases.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from rlhf_ray.cluster.colocation import COLOCATED_GROUPS
from rlhf_ray.config import Config
from rlhf_ray.observability.phases import LIMIT
from rlhf_ray.planning.memory import BYTES, Shape
from rlhf_ray.planning.role_times import (
    ASSUMPTIONS,
    WORKING_PHASES,
    Range,
    as_range,
    longest_shard,
    role_seconds,
)
from rlhf_ray.planning.roles import PlannedRole, Setting, state_bytes
from rlhf_ray.planning.shapes import Models

Sharing = Collection[Collection[PlannedRole]]
"""For each GPU, the role of each worker on it."""

SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class TimeEstimate:
    """Predicted seconds of an iteration of PPO, and the days of all of them."""

    phases: Mapping[str, Range]
    """Phase -> seconds of an iteration, named like the metrics ``timing_s/...``. A run spends
    ``turns`` (sleep and wake) within its phases ``score`` and ``sync``."""
    days: Range
    """Days of PPO's iterations; without evaluations."""
    idle_gpu_hours: float
    """Hours that GPUs of PPO are idle, because no role on them works; at the range's midpoint."""
    is_ahead: bool = False
    """Whether generators sample beside the other phases."""

    @property
    def iteration(self) -> Range:
        """Seconds of an iteration."""
        return _iteration(self.phases, is_ahead=self.is_ahead)


def middle(ends: Range) -> float:
    """Return the midpoint of a range."""
    return (ends[0] + ends[1]) / 2


def estimate_time(setting: Setting, sharing: Sharing) -> TimeEstimate | None:
    """Estimate the time of PPO; None where the speed of a GPU is unknown."""
    kinds = [kind for kind in setting.kinds.values() if kind is not None and kind.bf16_tflops]
    if not kinds or len(kinds) < len(setting.kinds):
        return None
    config = setting.config
    phases = _phases(setting, sharing)
    is_ahead = config.ppo.max_staleness > 0 and not any(_is_shared(held) for held in sharing)
    iteration = _iteration(phases, is_ahead=is_ahead)
    days = as_range(config.ppo.iterations * each / SECONDS_PER_DAY for each in iteration)
    idle = sum(idle_seconds(held, phases, is_ahead=is_ahead) for held in sharing)
    return TimeEstimate(phases, days, idle * config.ppo.iterations / 3600, is_ahead)


def _is_shared(held: Collection[PlannedRole]) -> bool:
    """Return whether a generator shares a GPU with other roles."""
    return "generator" in {role.role for role in held} != {"generator"}


def _iteration(phases: Mapping[str, Range], *, is_ahead: bool) -> Range:
    return as_range(
        iteration_seconds({name: ends[end] for name, ends in phases.items()}, is_ahead=is_ahead)
        for end in (0, 1)
    )


def iteration_seconds(phases: Mapping[str, float], *, is_ahead: bool) -> float:
    """Return the seconds of an iteration: of all phases, or of the longer side."""
    total = sum(phases.values())
    generating = phases.get("gen", 0.0)
    return max(generating, total - generating) if is_ahead else total


def sync_bytes(config: Config, shape: Shape) -> int:
    """Return the bytes of the adapter that each generator receives after an iteration."""
    return int(shape.adapter_parameters(config.lora) * BYTES[config.model.dtype])


def _phases(setting: Setting, sharing: Sharing) -> dict[str, Range]:
    phases = _working_phases(setting, sharing) | fixed_phases(setting)
    if setting.config.placement.turns:
        phases["turns"] = turn_seconds(_moved_bytes(sharing))
    return phases


def fixed_phases(setting: Setting) -> dict[str, Range]:
    """Return the phases that are the same in every layout."""
    config, models, ends = setting.config, setting.models, (0, 1)
    state = state_bytes(config, models) / 1e9
    sent = sync_bytes(config, models.tuned.shape) / 1e9
    rates = ASSUMPTIONS["GB/s from a learner through the object store"]
    fixed = ASSUMPTIONS["publishing an adapter, fixed seconds"]
    return {
        "commit": as_range(state / rates[end] for end in ends),
        "sync": as_range(fixed[end] + sent / rates[end] for end in ends),
    }


def save_seconds(config: Config, models: Models) -> Range:
    """Return the seconds in which a commit is written to run.dir, beside the next iteration."""
    state = state_bytes(config, models) / 1e9
    return as_range(state / rate for rate in ASSUMPTIONS["GB/s to run.dir"])


def turn_seconds(moved: float) -> Range:
    """Return the seconds in which a GPU moves so many bytes to main memory or back."""
    link = ASSUMPTIONS["GB/s between GPU and host memory for sleep and wake"]
    return as_range(moved / 1e9 / rate for rate in link)


def _working_phases(setting: Setting, sharing: Sharing) -> dict[str, Range]:
    """Return the phases in which roles compute; each lasts until the slowest GPU is done."""
    beside = {
        role.role
        for held in sharing
        for role in held
        if any(other.role == "generator" for other in held)
    }
    alone = {
        role: role_seconds(setting, role, is_beside_generator=role in beside)
        for role in setting.kinds
    }
    return {
        phase: as_range(
            _on_slowest_gpu({role: alone[role][phase][end] for role in alone}, sharing)
            for end in (0, 1)
        )
        for phase in WORKING_PHASES
    }


def _on_slowest_gpu(seconds: Mapping[str, float], sharing: Sharing) -> float:
    """Return the seconds of the slowest GPU: roles run in parallel, but share their GPU."""
    return max(sum(seconds[role.role] for role in held) for held in sharing)


def _moved_bytes(sharing: Sharing) -> float:
    """Return the bytes that one GPU moves when colocated roles sleep and wake, twice an iteration.

    Each time, weights leave every GPU of one side at once, then those of the other side come back;
    caches are dropped, and trained state stays. The fullest GPU of a side counts.
    """
    largest = dict.fromkeys(COLOCATED_GROUPS.values(), 0.0)
    for held in sharing:
        for side in largest:
            weights = sum(r.parts["weights"] for r in held if COLOCATED_GROUPS.get(r.role) == side)
            largest[side] = max(largest[side], weights)
    return 2 * sum(largest.values())


_BUSY: dict[str, tuple[str, ...]] = {
    "generator": ("gen", "sync", "turns"),
    "policy": ("score", "learn", "commit", "turns"),
    "critic": ("score", "learn", "commit", "turns"),
    "reference": ("score",),
    "reward": ("score",),
}
"""Role -> the phases it works in."""


def idle_seconds(
    held: Collection[PlannedRole], phases: Mapping[str, Range], *, is_ahead: bool = False
) -> float:
    """Return the seconds of an iteration in which no role on a GPU works."""
    busy = {name for role in held for name in _BUSY[role.role]}
    seconds = {name: middle(ends) for name, ends in phases.items()}
    if is_ahead:
        working_s = sum(seconds[name] for name in busy if name in seconds)
        return max(0.0, iteration_seconds(seconds, is_ahead=True) - working_s)
    return sum(each for name, each in seconds.items() if name not in busy)


def late_calls(setting: Setting, time: TimeEstimate | None) -> str | None:
    """Return a warning about calls that miss their deadline at the predicted worst, if any do.

    Progress renews it up to `LIMIT` times.
    """
    limit_s = LIMIT * setting.config.cluster.call_timeout_s
    if time is None or not time.phases or not setting.config.cluster.runs_on_ray:
        return None
    longest = {
        "a shard of a generator": longest_shard(setting),
        # Shards queue at their scorer: of those that come at once, the last waits for all others.
        "the last score of a batch": time.phases["score"][1],
        "learn": time.phases["learn"][1],
    }
    late = {call: seconds for call, seconds in longest.items() if seconds > limit_s}
    if not late:
        return None
    listed = ", ".join(f"{call} {math.ceil(seconds):,} s" for call, seconds in late.items())
    return (
        f"at the predicted worst calls miss their deadline: {listed}, and the limit is {limit_s:g} "
        f"s ({LIMIT} times cluster.call_timeout_s). A late process is replaced, and its work done "
        f"again; set cluster.call_timeout_s={math.ceil(max(late.values()) / LIMIT)} or more"
    )
