"""Other configs for the same job: the smallest changes that make it fit, and other layouts."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rlhf_ray.config import Config
from rlhf_ray.config.load import resolve
from rlhf_ray.config.stages import SUPERVISED
from rlhf_ray.errors import ConfigError
from rlhf_ray.placement.layout import Node, Slot, demands
from rlhf_ray.planning.prediction import Plan, prediction
from rlhf_ray.planning.throughput import Range, TimeEstimate

Change = Mapping[str, object]
"""Config key -> its new value."""

BASE_AS_REFERENCE: Change = {"reference.kind": "policy_base", "reference.num_workers": 1}
"""The policy's base also serves as the reference."""


MAX_SINGLE_CHANGES = 4
"""Most single changes that are suggested, where each alone makes it fit."""

POLICY_PART, GENERATOR_PART = 0.4, 0.6
"""Shares of a GPU for colocated roles: one of each fills it, and two generators never share one."""
SMALLER_ENGINE = 0.8
"""rollout.engine_args.gpu_memory_utilization that leaves memory for what learners keep asleep."""


def changed(config: Config, change: Change) -> Config:
    """Return the config with a change.

    Raises:
        ConfigError: the changed config is not valid.
    """
    values = config.model_dump(mode="json")
    for key, value in change.items():
        section = values
        *path, name = key.split(".")
        for part in path:
            section = section[part]
        section[name] = value
    return resolve(values)


def fitting_changes(plan: Plan) -> list[Change]:
    """Return changes that each make the config fit, the cheapest first; each has been planned.

    Single changes where any is enough; else one that joins several, none of which can be left out;
    none where no change tried here is enough.
    """
    candidates = list(_change_candidates(plan.config))
    single = [change for change in candidates if _missing(plan, [change]) == 0]
    if single:
        return single[:MAX_SINGLE_CHANGES]
    helpful, still_missing = _helping(plan, candidates)
    return [] if still_missing else [_joined(_needed(plan, helpful))]


def _helping(plan: Plan, candidates: Sequence[Change]) -> tuple[list[Change], float]:
    """Return changes that each reduce the shortage further, and the bytes that are still short."""
    helpful: list[Change] = []
    least = plan.missing
    for change in candidates:
        missing = _missing(plan, [*helpful, change])
        if missing < least:
            helpful.append(change)
            least = missing
    return helpful, least


def _needed(plan: Plan, helpful: Sequence[Change]) -> list[Change]:
    """Drop the changes that it fits without, trying the most expensive first."""
    kept = list(helpful)
    for change in reversed(helpful):
        rest = [other for other in kept if other is not change]
        if _missing(plan, rest) == 0:
            kept = rest
    return kept


def _joined(changes: Sequence[Change]) -> Change:
    return {key: value for change in changes for key, value in change.items()}


def _missing(plan: Plan, changes: Sequence[Change]) -> float:
    """Return the bytes that are short with these changes; infinity if the config is invalid."""
    try:
        return prediction(changed(plan.config, _joined(changes)), plan.nodes).missing
    except ConfigError:
        return math.inf


def _change_candidates(config: Config) -> Iterator[Change]:
    """Yield changes, from those that cost a little time to those that change what is learnt."""
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
        if learners and share < config.placement.gpus_of("policy"):
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
    """Return the supervised stages that train."""
    return [
        name
        for name in SUPERVISED
        if name in config.run.stages and config.external_model(name) is None
    ]


def _learners(config: Config) -> list[str]:
    """Return PPO's learner groups, if it runs."""
    if "ppo" not in config.run.stages:
        return []
    return ["policy", "critic"] if config.may_have_critic else ["policy"]


def _is_full(config: Config, name: str) -> bool:
    return getattr(getattr(config, name), "tuning", None) == "full"


@dataclass(frozen=True)
class Layout:
    """One layout of PPO's roles."""

    changes: Change
    """Changes of the given config; empty for the given layout."""
    gpus: int
    """Number of GPUs with a role on them."""
    days: Range
    """See `TimeEstimate`."""
    idle_gpu_hours: float
    """See `TimeEstimate`."""


def layouts(plan: Plan) -> list[Layout]:
    """Return the given layout and others that fit; none if it doesn't fit or has no known time."""
    if not plan.fits or plan.time is None or not plan.places:
        return []
    others = (_first(plan, variants) for variants in _layout_candidates(plan.config, plan.nodes))
    return [_layout({}, plan, plan.time), *(other for other in others if other)]


def _layout(changes: Change, plan: Plan, time: TimeEstimate) -> Layout:
    return Layout(changes, len(_gpus(plan.places)), time.days, time.idle_gpu_hours)


def _gpus(places: Sequence[Slot], *roles: str) -> set[tuple[int, int]]:
    """Return (node, index) of the GPUs of some roles, or of all roles if none is named."""
    return {(p.node, gpu) for p in places if not roles or p.role in roles for gpu in p.gpus}


def _first(plan: Plan, variants: Sequence[Change]) -> Layout | None:
    """Return the first variant that is valid and fits."""
    for variant in variants:
        try:
            other = prediction(changed(plan.config, variant), plan.nodes)
        except ConfigError:
            continue
        if other.fits and other.time and _sleepers_share(other):
            return _layout(variant, other, other.time)
    return None


def _sleepers_share(plan: Plan) -> bool:
    """True unless colocated generators are on GPUs without a learner."""
    if not plan.config.placement.turns:
        return True
    return _gpus(plan.places, "generator") <= _gpus(plan.places, "policy", "critic")


def _layout_candidates(config: Config, nodes: Sequence[Node]) -> Iterator[list[Change]]:
    """Yield the variants of each kind of layout, in the order in which they are tried."""
    if config.reference.kind == "policy_base":
        yield [{"reference.kind": "own"}]
    elif config.reference.num_workers == 1:
        yield [{"reference.kind": "policy_base"}]
    else:
        yield [BASE_AS_REFERENCE]
    if any(demand.role == "reward" and demand.gpus for demand in demands(config)):
        workers = config.reward.num_workers
        for count in (workers // 2, workers * 2):
            if count:
                yield [{"reward.num_workers": count}]
    if config.placement.turns:
        yield _without_turns(config)
    elif config.rollout.engine == "vllm":
        yield _with_turns(config, nodes)


def _without_turns(config: Config) -> list[Change]:
    """Return variants without sleeping: on separate GPUs, or else together on shared ones."""
    turns = {"placement.turns": False}
    return [{**turns, "placement.policy.gpus": 1.0, "placement.generator.gpus": 1.0}, turns]


def _with_turns(config: Config, nodes: Sequence[Node]) -> list[Change]:
    """Return variants in which each generator sleeps and wakes on a policy rank's GPU."""
    placement = config.placement
    change: dict[str, object] = {"placement.turns": True}
    if 1 in (placement.gpus_of("policy"), placement.gpus_of("generator")):
        change["placement.policy.gpus"] = POLICY_PART
        change["placement.generator.gpus"] = GENERATOR_PART
    if config.generators.num > config.policy.num_ranks:
        change["generators.num"] = config.policy.num_ranks
    labels = placement.generator.labels
    if any(key in node.labels for key in labels for node in nodes):
        change["placement.generator.labels"] = placement.policy.labels
    smaller = {**change, "rollout.engine_args.gpu_memory_utilization": SMALLER_ENGINE}
    return [change, smaller]
