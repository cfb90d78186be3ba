"""The search finds what trying every combination finds."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

from rlhf_ray.config import load
from rlhf_ray.errors import ConfigError
from rlhf_ray.placement.hardware import GPU_KINDS, parse_cluster
from rlhf_ray.placement.layout import demands
from rlhf_ray.planning.layout_options import Space, changed, copied, sharings
from rlhf_ray.planning.layouts import STEP, Costs, costs_of, front
from rlhf_ray.planning.memory import GB
from rlhf_ray.planning.prediction import USABLE, Plan, on_gpus, prediction, together

STACKLLAMA = Path(__file__).parents[3] / "configs" / "stackllama"
START = (
    *("placement={}", "critic.num_ranks=1", "policy.num_ranks=1", "generators.num=1"),
    *("reward.num_workers=1", "rollout.engine_args={}"),
)
MEMORY = GPU_KINDS["A100-80GB"].memory_gb * GB
Change = Mapping[str, object]


def space_of(cluster: str, *keys: str, kept: tuple[str, ...]) -> Space:
    config = load(STACKLLAMA / "ppo_1x8_a100.yaml", [*START, *keys])
    nodes = parse_cluster(cluster)
    return Space(config, prediction(config, nodes).models, nodes, kept)


def best_of(space: Space) -> Costs:
    """Return the fewest seconds and GPU-seconds that the search finds."""
    found = [costs_of(plan) for _, plan in front(space, [], 0.0, may_be_late=True)]
    return min(seconds for seconds, _ in found), min(of_gpus for _, of_gpus in found)


def best_of_all(space: Space, changes: Iterator[Change]) -> Costs:
    found = [costs_of(plan) for plan in (full_plan(space, change) for change in changes) if plan]
    return min(seconds for seconds, _ in found), min(of_gpus for _, of_gpus in found)


def full_plan(space: Space, change: Change) -> Plan | None:
    config = copied(space.config, change)
    if sum(demand.workers * demand.gpus for demand in demands(config)) > space.gpus + 1e-9:
        return None
    plan = prediction(config, space.nodes)
    turns = config.placement.turns
    shared = [held for held in on_gpus(plan.roles, plan.places).values() if len(held) > 1]
    is_tight = any(together(held, turns) > (USABLE - STEP) * MEMORY + 1 for held in shared)
    if not plan.fits or plan.time is None or is_tight:
        return None
    try:
        changed(space.config, change)
    except ConfigError:
        return None
    return plan


def counts(most: int, **more: tuple[object, ...]) -> Iterator[Change]:
    """Yield every number of workers of every role."""
    names = ["policy.num_ranks", "critic.num_ranks", "generators.num", "reward.num_workers"]
    number = range(1, most + 1)
    for chosen in itertools.product(number, number, number, number, range(most + 1)):
        *workers, references = chosen
        own = {"reference.kind": "own", "reference.num_workers": references}
        base = {"reference.kind": "policy_base", "reference.num_workers": 1}
        change = dict(zip(names, workers, strict=True)) | (own if references else base)
        for values in itertools.product(*more.values()):
            yield change | dict(zip(more, values, strict=True))


def test_on_four_gpus_of_their_own_no_numbers_of_workers_are_better() -> None:
    kept = ("placement", "ppo.max_tokens_per_micro_batch")
    space = space_of("4xA100-80GB", kept=kept)
    changes = counts(4, **{"generators.tensor_parallel_size": (1, 2, 4)})
    assert best_of(space) == best_of_all(space, changes)


def test_on_two_shared_gpus_nothing_is_better() -> None:
    kept = (
        *("generators.tensor_parallel_size", "ppo.max_tokens_per_micro_batch", "reference.kind"),
        *("policy.gradient_checkpointing", "critic.gradient_checkpointing"),
    )
    space = space_of("2xA100-80GB", kept=kept)
    shares = tuple(round(STEP * n, 2) for n in range(4, 19))

    def changes() -> Iterator[Change]:
        for sharing in sharings(space, space.config):
            shared = any("generator" in pool and len(pool) > 1 for pool in sharing.pools)
            utilization = {"rollout.engine_args.gpu_memory_utilization": shares} if shared else {}
            for change in counts(2, **utilization):
                if change["reference.kind"] == "policy_base":
                    yield {**sharing.change, **change}

    assert best_of(space) == best_of_all(space, changes())


def test_in_turns_too_nothing_is_better() -> None:
    kept = (
        *("generators", "ppo.max_tokens_per_micro_batch", "policy.num_ranks", "reference.kind"),
        *("policy.gradient_checkpointing", "critic.gradient_checkpointing"),
    )
    keys = ("model.quantization=none", "generators.num=2", "policy.num_ranks=2")
    space = space_of("3xA100-80GB", *keys, kept=kept)
    shares = tuple(round(STEP * n, 2) for n in range(4, 19))

    def changes() -> Iterator[Change]:
        for sharing in sharings(space, space.config):
            shared = any("generator" in pool and len(pool) > 1 for pool in sharing.pools)
            utilization = {"rollout.engine_args.gpu_memory_utilization": shares} if shared else {}
            for change in counts(3, **utilization):
                if change["reference.kind"] == "policy_base" and (
                    change["policy.num_ranks"] == change["generators.num"] == 2
                ):
                    yield {**sharing.change, **change}

    assert best_of(space) == best_of_all(space, changes())
