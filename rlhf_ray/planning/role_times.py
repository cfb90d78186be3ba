"""Estimate how long one role works in an iteration, alone on its GPUs: a roofline model.

A pass over a token costs two operations a parameter, its backward pass through a frozen base two
more (four where the weights are trained), recomputing two (Kaplan et al. 2020, arXiv:2001.08361,
section 2.1). Sampling a token reads all weights and the caches of its batch once.
"""

import math
from collections.abc import Iterable

from rlhf_ray.cluster.colocation import COLOCATED_GROUPS
from rlhf_ray.config import Config
from rlhf_ray.config.learners import LearnerConfig
from rlhf_ray.placement.hardware import NETWORK_GB_PER_S, GpuKind
from rlhf_ray.planning.memory import BYTES, Shape
from rlhf_ray.planning.roles import Setting, engine

Range = tuple[float, float]
"""The best and the worst case."""

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
    "GB/s from a model's folder": (2.0, 0.2),
    "starting a stage's processes, seconds": (10.0, 60.0),
    "GB/s between GPU and host memory for sleep and wake": (20.0, 2.0),
    "all-reduce within a generator of several GPUs, fixed seconds": (1e-5, 5e-5),
    "length of texts that are not packed, as a share of the longest": (0.5, 1.0),
    "prepare, MB of a dump's XML a second on one core": (3.5, 1.0),
    "prepare, cores of a node for each of its GPUs": (12, 6),
    "prepare, share of its speed that a core keeps beside others": (0.95, 0.7),
    "prepare, MB of XML a second out of one archive": (80, 30),
    "prepare, bytes of the sets for one of the dump's XML": (0.6, 1.05),
    "prepare, bytes of the grouped posts for one of the dump's XML": (0.2, 0.3),
}
"""Name of an assumption -> its best and worst case. Those of prepare were measured
(docs/performance.md, "A large dump"), but for a node's cores and many cores' speed; the others are
confirmed by no GPU."""

SEQUENCES_AT_A_TIME = 256
"""Most sequences that vLLM samples together (its max_num_seqs)."""


WORKING_PHASES = ("gen", "score", "learn")


def role_seconds(setting: Setting, role: str, *, is_beside_generator: bool) -> dict[str, Range]:
    """Return phase -> seconds that a role works in an iteration, alone on its GPUs.

    Args:
        setting: the config and its GPUs.
        role: one that runs on GPUs.
        is_beside_generator: whether it shares a GPU with a generator, so that its scores can't be
            computed while others generate.
    """
    seconds: dict[str, Range] = dict.fromkeys(WORKING_PHASES, (0.0, 0.0))
    if role == "generator":
        seconds["gen"] = as_range(_generate(setting, end) for end in (0, 1))
        return seconds
    is_learner = role in ("policy", "critic")
    sleeps = setting.config.placement.turns and role in COLOCATED_GROUPS
    comes_later = setting.config.ppo.max_staleness > 0 and is_learner  # just before it learns
    overlaps = not (sleeps or is_beside_generator or comes_later)
    seconds["score"] = as_range(_score(setting, role, end, overlaps) for end in (0, 1))
    if is_learner:
        seconds["learn"] = as_range(_learn(setting, role, end) for end in (0, 1))
    return seconds


def as_range(ends: Iterable[float]) -> Range:
    """Return the best and the worst of two ends."""
    best, worst = ends
    return best, worst


def num_shards(config: Config) -> int:
    """Return the shards of an iteration: what generators and scorers divide among themselves."""
    return math.ceil(config.ppo.batch_size / config.rollout.shard_size)


def _rollouts(config: Config) -> int:
    """Return the rollouts of the generator that has most."""
    shards = math.ceil(num_shards(config) / config.generators.num)
    return min(shards * config.rollout.shard_size, config.ppo.batch_size)


def _generate(setting: Setting, end: int) -> float:
    config = setting.config
    return sample_seconds(setting, _rollouts(config), response_tokens(config, end), end)


def longest_shard(setting: Setting) -> float:
    """Return the worst seconds of a call for one shard: until all rollouts in flight at its
    generator are done, each of full length."""
    config = setting.config
    sampler = config.rollout.length_sampler
    longest = sampler.max - 1 if sampler else config.rollout.max_tokens
    return sample_seconds(setting, min(_rollouts(config), _in_flight(config)), longest, end=1)


def _in_flight(config: Config) -> int:
    """Return how many rollouts a generator has in flight."""
    return config.generators.max_in_flight * config.rollout.shard_size


def sample_seconds(setting: Setting, rollouts: int, steps: float, end: int) -> float:
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
    beside += _all_reduces(setting, kind, together, end)
    waves = math.ceil(rollouts / together)
    return waves * steps * (of_token + beside) + rollouts * prompt * operations / flops


def response_tokens(config: Config, end: int) -> float:
    """Return the mean length of a response."""
    sampler = config.rollout.length_sampler
    longest = (sampler.min + sampler.max - 1) / 2 if sampler else config.rollout.max_tokens
    if config.rollout.ignore_eos:
        return longest
    return longest * ASSUMPTIONS["response length as a share of rollout.max_tokens"][end]


def _iteration_tokens(config: Config, end: int) -> float:
    return config.ppo.batch_size * (config.rollout.max_prompt_tokens + response_tokens(config, end))


def _all_reduces(setting: Setting, kind: GpuKind, tokens: int, end: int) -> float:
    """Return the seconds in which the GPUs of one generator add up what each has computed, twice a
    layer."""
    size, shape = setting.config.generators.tensor_parallel_size, setting.models.tuned.shape
    if size == 1:
        return 0.0
    fixed = ASSUMPTIONS["all-reduce within a generator of several GPUs, fixed seconds"][end]
    sent = 2 * (size - 1) / size * tokens * shape.hidden_size * BYTES[setting.config.engine_dtype]
    return 2 * shape.num_layers * (fixed + sent / (kind.link_gb_per_s * 1e9))


def _score(setting: Setting, role: str, end: int, overlaps: bool) -> float:
    """Return the seconds of a role's scoring after generation has ended.

    Shards go to its workers in rotation. At ZeRO stage 3 all ranks compute every shard, because
    none has all weights.

    Args:
        setting: the config and its GPUs.
        role: one that scores.
        end: 0 for the best case, 1 for the worst.
        overlaps: whether it scores while others generate.
    """
    config, models, kind = setting.config, setting.models, setting.kinds[role]
    assert kind is not None
    shape, workers = {
        "policy": (models.tuned.shape, config.policy.num_ranks),
        "critic": (models.critic.shape, config.critic.num_ranks),
        "reference": (models.tuned.shape, config.reference.num_processes),
        "reward": (models.reward.shape, config.reward.num_workers),
    }[role]
    passes = 2 if role == "policy" and config.reference.kind == "policy_base" else 1
    shards = num_shards(config)
    seconds = 0.0
    if role in ("policy", "critic") and _is_sharded(getattr(config, role)):
        workers = 1
        micro_batches = shards * math.ceil(
            config.rollout.shard_size * setting.longest() / setting.scored().tokens
        )
        seconds += _gathers(setting, shape, kind, passes * micro_batches, end)
    share = math.ceil(shards * passes / workers) / shards
    operations = 2 * share * _iteration_tokens(config, end) * shape.size.parameters
    reached = ASSUMPTIONS["scorers and prefill, MFU"][end]
    seconds += operations / (kind.bf16_tflops * 1e12 * reached)
    after = ASSUMPTIONS["share of scoring that does not overlap generation"][end]
    return seconds * (after if overlaps else 1.0)


def _is_sharded(group: LearnerConfig) -> bool:
    return group.zero_stage == 3 and group.num_ranks > 1


def _gathers(setting: Setting, shape: Shape, kind: GpuKind, passes: int, end: int) -> float:
    """Return the seconds in which ZeRO-3 gathers all weights for each of so many passes."""
    weights = shape.size.parameters * BYTES[setting.config.model.dtype] / 1e9
    rate = kind.link_gb_per_s if end == 0 else min(NETWORK_GB_PER_S, kind.link_gb_per_s)
    return passes * weights / rate


def _learn(setting: Setting, role: str, end: int) -> float:
    """Return the seconds of a group's updates."""
    config, kind = setting.config, setting.kinds[role]
    assert kind is not None
    shape = (setting.models.tuned if role == "policy" else setting.models.critic).shape
    group: LearnerConfig = getattr(config, role)
    tokens = config.ppo.epochs * _iteration_tokens(config, end)
    passes = 4 + 2 * group.gradient_checkpointing
    operations = passes * tokens * shape.size.parameters / group.num_ranks
    seconds = operations / (kind.bf16_tflops * 1e12 * learners_mfu(config, end))
    if _is_sharded(group):
        micro_batches = math.ceil(tokens / group.num_ranks / setting.learnt(group).tokens)
        gathers = micro_batches * (2 + group.gradient_checkpointing)
        seconds += _gathers(setting, shape, kind, gathers, end)
    return seconds


def learners_mfu(config: Config, end: int) -> float:
    """Return the share of a GPU's peak that learners reach on the config's base."""
    is_whole = config.model.quantization == "none"
    learners = "learners, share of the GPU's peak bf16 FLOP/s (MFU)"
    return ASSUMPTIONS[learners if is_whole else "learners on an int8 or nf4 base, MFU"][end]
