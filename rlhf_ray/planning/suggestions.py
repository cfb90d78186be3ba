"""The smallest changes of a config with which it would fit."""

import math
from collections.abc import Iterator, Sequence

from rlhf_ray.config import Config
from rlhf_ray.config.stages import SUPERVISED
from rlhf_ray.errors import ConfigError
from rlhf_ray.planning.changes import BASE_AS_REFERENCE, Change, changed
from rlhf_ray.planning.prediction import Plan, prediction

MOST = 4
"""Single changes that are named, if so many are enough by themselves."""


def remedies(plan: Plan) -> list[Change]:
    """Changes each of which makes it fit, the one that costs least first; each was planned.

    Single ones where there are any; else one of several keys, none of which could be left out;
    none where no change that is tried here is enough.
    """
    candidates = list(_candidates(plan.config))
    single = [change for change in candidates if _missing(plan, [change]) == 0]
    if single:
        return single[:MOST]
    together, least = _helping(plan, candidates)
    return [] if least else [_joined(_needed(plan, together))]


def _helping(plan: Plan, candidates: Sequence[Change]) -> tuple[list[Change], float]:
    """Those that each bring it nearer to fitting than those before did, and what is still short."""
    together: list[Change] = []
    least = plan.missing
    for change in candidates:
        missing = _missing(plan, [*together, change])
        if missing < least:
            together.append(change)
            least = missing
    return together, least


def _needed(plan: Plan, together: Sequence[Change]) -> list[Change]:
    """Without those that it fits without, the ones that cost most tried first."""
    kept = list(together)
    for change in reversed(together):
        rest = [other for other in kept if other is not change]
        if _missing(plan, rest) == 0:
            kept = rest
    return kept


def _joined(changes: Sequence[Change]) -> Change:
    return {key: value for change in changes for key, value in change.items()}


def _missing(plan: Plan, changes: Sequence[Change]) -> float:
    """Bytes that are short with these changes; infinitely many where they make no valid config."""
    try:
        return prediction(changed(plan.config, _joined(changes)), plan.nodes).missing
    except ConfigError:
        return math.inf


def _candidates(config: Config) -> Iterator[Change]:
    """From what costs a little time to what changes what is learnt."""
    yield from _recomputed(config)
    yield from _smaller_passes(config)
    yield from _spread(config)
    yield from _fewer(config)
    yield from _smaller_models(config)


def _recomputed(config: Config) -> Iterator[Change]:
    for name in (*_stages(config), *_learners(config)):
        if not getattr(config, name).gradient_checkpointing:
            yield {f"{name}.gradient_checkpointing": True}


def _smaller_passes(config: Config) -> Iterator[Change]:
    tokens = config.ppo.max_tokens_per_micro_batch if _learners(config) else 0
    longest = config.rollout.max_prompt_tokens + config.rollout.max_tokens
    while tokens > longest:
        tokens = max(tokens // 2, longest)
        yield {"ppo.max_tokens_per_micro_batch": tokens}
    for name in _stages(config):
        stage = getattr(config, name)
        accumulated = stage.trainer.get("gradient_accumulation_steps", 1)
        while accumulated < stage.batch_size // stage.train_workers:
            accumulated *= 2
            yield {f"{name}.trainer.gradient_accumulation_steps": accumulated}


def _spread(config: Config) -> Iterator[Change]:
    if not _learners(config):
        return
    size = config.generators.tensor_parallel_size
    for times in (2, 4, 8):
        yield {"generators.tensor_parallel_size": size * times}
    if config.reference.kind == "own":
        yield BASE_AS_REFERENCE
    for role in _learners(config):
        if getattr(config, role).zero_stage < 3:
            yield {f"{role}.zero_stage": 3}


def _fewer(config: Config) -> Iterator[Change]:
    counts = {
        f"{name}.train_workers": getattr(config, name).train_workers for name in _stages(config)
    }
    if learners := _learners(config):
        counts |= {
            "generators.num": config.generators.num,
            "reward.num_workers": config.reward.num_workers,
            "reference.num_workers": config.reference.num_workers,
            **{f"{role}.num_ranks": getattr(config, role).num_ranks for role in learners},
        }
    for key, count in counts.items():
        while count > 1:
            count //= 2
            yield {key: count}
    for share in (0.5, 0.25):
        if learners and share < config.placement.gpus:
            utilization = {"rollout.engine_args.gpu_memory_utilization": share}
            yield {"placement.gpus": share, **utilization}


def _smaller_models(config: Config) -> Iterator[Change]:
    if config.model.dtype == "float32":
        yield {"model.dtype": "bfloat16"}
    full = {f"{name}.tuning": "lora" for name in _stages(config) if _is_full(config, name)}
    if full:
        yield full
    smaller = {"none": ("int8", "nf4"), "int8": ("nf4",), "nf4": ()}
    unsharded = {
        f"{role}.zero_stage": 2
        for role in ("policy", "critic")
        if getattr(config, role).zero_stage == 3
    }
    for quantization in smaller[config.model.quantization]:
        yield {"model.quantization": quantization, **full, **unsharded}


def _stages(config: Config) -> list[str]:
    """The supervised stages that would train."""
    return [
        name
        for name in SUPERVISED
        if name in config.run.stages and config.external_model(name) is None
    ]


def _learners(config: Config) -> list[str]:
    """PPO's groups, where it runs."""
    if "ppo" not in config.run.stages:
        return []
    return ["policy", "critic"] if config.may_have_critic else ["policy"]


def _is_full(config: Config, name: str) -> bool:
    return getattr(getattr(config, name), "tuning", None) == "full"
