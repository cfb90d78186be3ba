"""Estimate how long an iteration takes: a roofline model with stated ranges, not a measurement.

A pass over a token costs two operations a parameter, its backward pass through a frozen base two
more (four where the weights are trained), recomputing two (Kaplan et al. 2020, arXiv:2001.08361,
section 2.1). Sampling a token reads all weights and the caches of its batch once.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from rlhf_ray.cluster.colocation import COLOCATED_GROUPS
from rlhf_ray.config import Config
from rlhf_ray.config.ppo import LearnerConfig
from rlhf_ray.placement.hardware import NETWORK_GB_PER_S, GpuKind
from rlhf_ray.planning.memory import BYTES, Shape
from rlhf_ray.planning.roles import PlannedRole, Setting, engine, state_bytes
from rlhf_ray.planning.trainings import section, tokens_per_step, trained_parts

Range = tuple[float, float]
"""The best and the worst case."""

Sharing = Collection[Collection[PlannedRole]]
"""For each GPU, the role of each worker on it."""

ASSUMPTIONS: dict[str, Range] = {
    "learners, share of the GPU's peak bf16 FLOP/s (MFU)": (0.45, 0.2),
    "learners on an int8 or nf4 base, MFU": (0.25, 0.08),
    "scorers and prefill, MFU": (0.55, 0.25),
    "decoding, share of the GPU's memory bandwidth": (0.8, 0.4),
    "decoding, fixed seconds per step": (0.003, 0.015),
    "response length as a share of rollout.max_tokens": (0.5, 1.0),
    "share of scoring that does not overlap generation": (0.1, 1.0),
    "GB/s from a learner through the object store": (2.0, 0.4),
    "publishing an adapter, fixed seconds": (0.2, 2.0),
    "GB/s to run.dir": (1.0, 0.1),
    "GB/s between GPU and host memory for sleep and wake": (20.0, 2.0),
}
"""Name of an assumption -> its best and worst case."""

SEQUENCES_AT_A_TIME = 256
"""Most sequences that vLLM samples together (its max_num_seqs)."""
SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class TimeEstimate:
    """Predicted seconds of an iteration, and days of the run."""

    phases: Mapping[str, Range]
    """Phase -> seconds of an iteration, named like the metrics ``timing_s/...``. A run spends
    ``turns`` (sleep and wake) within its phases ``score`` and ``sync``."""
    days: Range
    """Days of PPO, and of supervised stages with a given number of steps; without evaluations."""
    idle_gpu_hours: float
    """Hours that GPUs of PPO are idle, because no role on them works; at the range's midpoint."""

    @property
    def iteration(self) -> Range:
        """Seconds of an iteration."""
        best, worst = (sum(phase[end] for phase in self.phases.values()) for end in (0, 1))
        return best, worst


def middle(ends: Range) -> float:
    """Return the midpoint of a range."""
    return (ends[0] + ends[1]) / 2


def estimate_time(setting: Setting, sharing: Sharing) -> TimeEstimate | None:
    """Estimate the time of a run; None where the speed of a GPU is unknown."""
    kinds = [kind for kind in setting.kinds.values() if kind is not None and kind.bf16_tflops]
    if not kinds or len(kinds) < len(setting.kinds):
        return None
    config = setting.config
    phases = _phases(setting, sharing) if "ppo" in config.run.stages else {}
    iteration = [sum(phase[end] for phase in phases.values()) for end in (0, 1)]
    slowest = min(kinds, key=lambda kind: kind.bf16_tflops)
    supervised = [_supervised(setting, slowest, end) for end in (0, 1)]
    best, worst = (
        (supervised[end] + config.ppo.iterations * iteration[end]) / SECONDS_PER_DAY
        for end in (0, 1)
    )
    idle = sum(idle_seconds(held, phases) for held in sharing)
    return TimeEstimate(phases, (best, worst), idle * config.ppo.iterations / 3600)


def sync_bytes(config: Config, shape: Shape) -> int:
    """Return the bytes of the adapter that each generator receives after an iteration."""
    return int(shape.adapter_parameters(config.lora) * BYTES[config.model.dtype])


def _phases(setting: Setting, sharing: Sharing) -> dict[str, Range]:
    config, models = setting.config, setting.models
    ends = (0, 1)
    phases = {
        "gen": _range(_generate(setting, end) for end in ends),
        "score": _range(_on_slowest_gpu(_score(setting, end), sharing) for end in ends),
        "learn": _range(_on_slowest_gpu(_learn(setting, end), sharing) for end in ends),
    }
    state = state_bytes(config, models) / 1e9
    sent = sync_bytes(config, models.tuned.shape) / 1e9
    rates = ASSUMPTIONS["GB/s from a learner through the object store"]
    fixed = ASSUMPTIONS["publishing an adapter, fixed seconds"]
    disk = ASSUMPTIONS["GB/s to run.dir"]
    phases["commit"] = _range(state / rates[end] for end in ends)
    phases["sync"] = _range(fixed[end] + sent / rates[end] for end in ends)
    phases["save"] = _range(state / disk[end] / config.ppo.save_every for end in ends)
    if config.placement.turns:
        moved = _moved_bytes(sharing) / 1e9
        link = ASSUMPTIONS["GB/s between GPU and host memory for sleep and wake"]
        phases["turns"] = _range(moved / link[end] for end in ends)
    return phases


def _on_slowest_gpu(seconds: Mapping[str, float], sharing: Sharing) -> float:
    """Return the seconds of the slowest GPU: roles run in parallel, but share their GPU."""
    return max(sum(seconds.get(role.role, 0.0) for role in held) for held in sharing)


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


def _range(ends: Iterable[float]) -> Range:
    best, worst = ends
    return best, worst


def _generate(setting: Setting, end: int) -> float:
    config = setting.config
    rollouts = math.ceil(config.ppo.batch_size / config.generators.num)
    return _sample(setting, rollouts, _response_tokens(config, end), end)


def longest_shard(setting: Setting) -> float:
    """Return the worst seconds of a call for one shard: until all rollouts in flight at its
    generator are done, each of full length."""
    config = setting.config
    rollouts = math.ceil(config.ppo.batch_size / config.generators.num)
    sampler = config.rollout.length_sampler
    longest = sampler.max - 1 if sampler else config.rollout.max_tokens
    return _sample(setting, min(rollouts, _in_flight(config)), longest, end=1)


def _in_flight(config: Config) -> int:
    """Return how many rollouts a generator has in flight."""
    return config.generators.max_in_flight * config.rollout.shard_size


def _sample(setting: Setting, rollouts: int, steps: float, end: int) -> float:
    """Return the seconds of a generator's rollouts of ``steps`` tokens each."""
    config, shape = setting.config, setting.models.tuned.shape
    kind, generator = setting.kinds["generator"], engine(setting)
    assert kind is not None
    size = config.generators.tensor_parallel_size
    cached = generator.sequences(setting.longest())
    together = max(1, min(rollouts, _in_flight(config), cached, SEQUENCES_AT_A_TIME))
    prompt = config.rollout.max_prompt_tokens
    read = generator.parts["weights"] + together * (prompt + steps / 2) * generator.token_bytes
    bandwidth = ASSUMPTIONS["decoding, share of the GPU's memory bandwidth"][end]
    flops = kind.bf16_tflops * 1e12 * ASSUMPTIONS["scorers and prefill, MFU"][end]
    operations = 2 * shape.size.parameters / size
    of_token = max(read / (kind.memory_gb_per_s * 1e9 * bandwidth), operations * together / flops)
    beside = ASSUMPTIONS["decoding, fixed seconds per step"][end]
    waves = math.ceil(rollouts / together)
    return waves * steps * (of_token + beside) + rollouts * prompt * operations / flops


def _response_tokens(config: Config, end: int) -> float:
    """Return the mean length of a response."""
    sampler = config.rollout.length_sampler
    longest = (sampler.min + sampler.max - 1) / 2 if sampler else config.rollout.max_tokens
    if config.rollout.ignore_eos:
        return longest
    return longest * ASSUMPTIONS["response length as a share of rollout.max_tokens"][end]


def _iteration_tokens(config: Config, end: int) -> float:
    return config.ppo.batch_size * (
        config.rollout.max_prompt_tokens + _response_tokens(config, end)
    )


def _score(setting: Setting, end: int) -> dict[str, float]:
    """Return role -> seconds of its scoring after generation has ended.

    A role that sleeps while others generate scores everything afterwards.
    """
    config, models = setting.config, setting.models
    tokens = _iteration_tokens(config, end)
    shapes = {
        "policy": (models.tuned.shape, config.policy.num_ranks),
        "critic": (models.critic.shape, config.critic.num_ranks),
        "reference": (models.tuned.shape, config.reference.num_processes),
        "reward": (models.reward.shape, config.reward.num_workers),
    }
    reached = ASSUMPTIONS["scorers and prefill, MFU"][end]
    after = ASSUMPTIONS["share of scoring that does not overlap generation"][end]
    seconds = {}
    for role, kind in setting.kinds.items():
        if role in shapes and kind is not None:
            shape, workers = shapes[role]
            passes = 2 if role == "policy" and config.reference.kind == "policy_base" else 1
            share = 1.0 if config.placement.turns and role in COLOCATED_GROUPS else after
            operations = 2 * passes * tokens * shape.size.parameters * share
            seconds[role] = operations / (workers * kind.bf16_tflops * 1e12 * reached)
    return seconds


def _learn(setting: Setting, end: int) -> dict[str, float]:
    """Return role -> seconds of its updates."""
    config, models = setting.config, setting.models
    groups: dict[str, tuple[LearnerConfig, Shape]] = {"policy": (config.policy, models.tuned.shape)}
    if config.may_have_critic:
        groups["critic"] = (config.critic, models.critic.shape)
    return {
        role: _group_learns(setting, role, group, shape, end)
        for role, (group, shape) in groups.items()
    }


def _group_learns(
    setting: Setting, role: str, group: LearnerConfig, shape: Shape, end: int
) -> float:
    config, kind = setting.config, setting.kinds[role]
    assert kind is not None
    tokens = config.ppo.epochs * _iteration_tokens(config, end)
    passes = 4 + 2 * group.gradient_checkpointing
    operations = passes * tokens * shape.size.parameters / group.num_ranks
    seconds = operations / (kind.bf16_tflops * 1e12 * _reached(config, end))
    if group.zero_stage == 3 and group.num_ranks > 1:
        micro_batches = math.ceil(tokens / group.num_ranks / setting.learnt(group).tokens)
        gathers = micro_batches * (2 + group.gradient_checkpointing)
        weights = shape.size.parameters * BYTES[config.model.dtype] / 1e9
        rate = kind.link_gb_per_s if end == 0 else min(NETWORK_GB_PER_S, kind.link_gb_per_s)
        seconds += gathers * weights / rate
    return seconds


def _reached(config: Config, end: int) -> float:
    is_whole = config.model.quantization == "none"
    learners = "learners, share of the GPU's peak bf16 FLOP/s (MFU)"
    return ASSUMPTIONS[learners if is_whole else "learners on an int8 or nf4 base, MFU"][end]


def _supervised(setting: Setting, kind: GpuKind, end: int) -> float:
    """Return the seconds of the supervised stages in sequence; stages with epochs are left out."""
    config, seconds = setting.config, 0.0
    for part in trained_parts(config, setting.models):
        if part.role in ("policy", "critic"):
            continue
        settings = section(config, part)
        if settings.epochs is not None:
            continue
        passes = (6 if part.lora is None else 4) + 2 * settings.gradient_checkpointing
        operations = passes * tokens_per_step(config, part) * part.shape.size.parameters
        rate = settings.train_workers * kind.bf16_tflops * 1e12 * _reached(config, end)
        seconds += settings.steps * operations / rate
    return seconds


_BUSY: dict[str, tuple[str, ...]] = {
    "generator": ("gen", "sync", "turns"),
    "policy": ("score", "learn", "commit", "turns"),
    "critic": ("score", "learn", "commit", "turns"),
    "reference": ("score",),
    "reward": ("score",),
}
"""Role -> the phases it works in."""


def idle_seconds(held: Collection[PlannedRole], phases: Mapping[str, Range]) -> float:
    """Return the seconds of an iteration in which no role on a GPU works."""
    busy = {name for role in held for name in _BUSY[role.role]}
    return sum(middle(ends) for name, ends in phases.items() if name not in busy)


def late_calls(setting: Setting, time: TimeEstimate | None) -> str | None:
    """Return a warning about calls that miss their deadline at the predicted worst, if any do."""
    limit_s = setting.config.cluster.call_timeout_s
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
        f"at the predicted worst calls miss their deadline: {listed}, and cluster.call_timeout_s "
        f"is {limit_s:g} s. A late generator is restarted, and any other late role ends the run; "
        f"set cluster.call_timeout_s={math.ceil(max(late.values()))} or more"
    )
