"""Other layouts of the same job side by side: which GPUs they take, for how long, and how idle."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.config import Config
from rlhf_ray.errors import ConfigError
from rlhf_ray.placement.layout import Node, Slot, demands
from rlhf_ray.planning.changes import BASE_AS_REFERENCE, Change, changed
from rlhf_ray.planning.prediction import Plan, prediction
from rlhf_ray.planning.throughput import Pace, Range

POLICY_PART, GENERATOR_PART = 0.4, 0.6
"""Of a GPU, where sides take turns on it: one of each fills it, and two generators never meet."""
SMALLER_ENGINE = 0.8
"""rollout.engine_args.gpu_memory_utilization that leaves room for what learners do not move."""


@dataclass(frozen=True)
class Layout:
    """One layout of PPO's roles."""

    changes: Change
    """Of the config that was given; none: as it is configured."""
    gpus: int
    """On which some role is."""
    days: Range
    """See `Pace`."""
    idle_gpu_hours: float
    """See `Pace`."""


def layouts(plan: Plan) -> list[Layout]:
    """The given layout, then others that fit; none where it does not fit or has no known pace."""
    if not plan.fits or plan.pace is None or not plan.places:
        return []
    others = (_first(plan, variants) for variants in _candidates(plan.config, plan.nodes))
    return [_layout({}, plan, plan.pace), *(other for other in others if other)]


def _layout(changes: Change, plan: Plan, pace: Pace) -> Layout:
    return Layout(changes, len(_gpus(plan.places)), pace.days, pace.idle_gpu_hours)


def _gpus(places: Sequence[Slot], *roles: str) -> set[tuple[int, int]]:
    """Node and index of the GPUs that some roles are on; none named: of all."""
    return {(p.node, gpu) for p in places if not roles or p.role in roles for gpu in p.gpus}


def _first(plan: Plan, variants: Sequence[Change]) -> Layout | None:
    """The first variant that is valid and fits."""
    for variant in variants:
        try:
            other = prediction(changed(plan.config, variant), plan.nodes)
        except ConfigError:
            continue
        if other.fits and other.pace and _turns_are_shared(other):
            return _layout(variant, other, other.pace)
    return None


def _turns_are_shared(plan: Plan) -> bool:
    """Whether sides that take turns do so on the same GPUs."""
    if not plan.config.placement.turns:
        return True
    return _gpus(plan.places, "generator") <= _gpus(plan.places, "policy", "critic")


def _candidates(config: Config, nodes: Sequence[Node]) -> Iterator[list[Change]]:
    """Of each kind its variants, the one that is tried first in front."""
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
    """On GPUs of their own, or else at once on those that they share."""
    turns = {"placement.turns": False}
    return [{**turns, "placement.policy.gpus": 1.0, "placement.generator.gpus": 1.0}, turns]


def _with_turns(config: Config, nodes: Sequence[Node]) -> list[Change]:
    """Each generator on a policy rank's GPU."""
    placement = config.placement
    change: dict[str, Any] = {"placement.turns": True}
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
