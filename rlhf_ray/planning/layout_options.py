"""What a layout is made of: what each role may be given, and which roles may share GPUs."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, get_args

from rlhf_ray.cluster.colocation import COLOCATED_GROUPS
from rlhf_ray.config import Config
from rlhf_ray.config.cluster import Role
from rlhf_ray.config.load import resolve
from rlhf_ray.placement.hardware import GPU_KINDS, GpuKind
from rlhf_ray.placement.layout import WORKERS_KEY, Node, demands
from rlhf_ray.planning.memory import Shape
from rlhf_ray.planning.role_times import WORKING_PHASES, num_shards, role_seconds
from rlhf_ray.planning.roles import UTILIZATION, PlannedRole, Setting, engine, planned_role
from rlhf_ray.planning.shapes import Models
from rlhf_ray.planning.throughput import turn_seconds

Change = Mapping[str, object]
"""Config key -> its new value."""
Roles = tuple[Role, ...]

LEARNERS: Roles = ("policy", "critic")
SCORERS: Roles = ("reference", "reward")
SHARED: tuple[tuple[Roles, ...], ...] = (
    (),
    (("critic", *SCORERS),),
    ((*LEARNERS, *SCORERS),),
    (("policy", "generator"),),
    (("policy", "generator"), ("critic", *SCORERS)),
    ((*LEARNERS, "generator", *SCORERS),),
)
"""Sets of roles that share GPUs; any other role has GPUs of its own."""
LEARNER_PART = 0.2
"""Part of a shared GPU of a learner, which never shares one with a rank of its own group."""
NEXT_PART = 0.6
"""Share of what is left for the next other role: more than half, so that two of its workers are
never on one GPU."""

PASS_KEY = "ppo.max_tokens_per_micro_batch"
UTILIZATION_KEY = "rollout.engine_args.gpu_memory_utilization"

Seconds = tuple[float, ...]
"""Seconds of the parts of an iteration that depend on the layout, best and worst ends apart: the
working phases, and turns of both sides. Roles on one GPU add up; of GPUs the slowest counts."""


@dataclass(frozen=True)
class Sharing:
    """Which roles share GPUs."""

    pools: tuple[Roles, ...]
    """The roles that need GPUs, each in one of them."""
    turns: bool
    change: Change
    """What gives it."""
    is_given: bool = False
    """Whether it is the config's own."""


@dataclass(frozen=True)
class Option:
    """One number of workers of a role, and how they work."""

    change: Change
    gpus: int
    """Whole GPUs that they are on."""
    held: PlannedRole
    least: float
    """Bytes without which it can't work: of a generator, with a cache for one sequence alone."""
    seconds: Seconds


@dataclass(frozen=True)
class Space:
    """A job on a cluster, and what may be changed of it."""

    config: Config
    models: Models
    nodes: Sequence[Node]
    kept: Collection[str]
    """Keys that stay as they are."""
    _options: dict[object, list[Option]] = field(default_factory=dict[object, list[Option]])
    _kinds: dict[int, GpuKind] = field(default_factory=dict[int, GpuKind])

    @property
    def gpus(self) -> int:
        """Number of GPUs."""
        return sum(node.gpus for node in self.nodes)

    def kind(self, gpus: int) -> GpuKind:
        """Return a kind that the worst of so many GPUs is no better than in any number."""
        if gpus not in self._kinds:
            kinds = [GPU_KINDS[str(node.gpu_kind)] for node in self.nodes for _ in range(node.gpus)]
            worst = min(gpus, len(kinds)) - 1
            names = ("memory_gb", "bf16_tflops", "memory_gb_per_s", "link_gb_per_s")
            numbers = {
                name: sorted((getattr(kind, name) for kind in kinds), reverse=True)[worst]
                for name in names
            }
            self._kinds[gpus] = GpuKind(**numbers, ray_names=())
        return self._kinds[gpus]

    def differing(self, change: Change) -> Change | None:
        """Return the part of a change that differs from the config; None if it may not change."""
        new = {key: value for key, value in change.items() if _value(self.config, key) != value}
        is_kept = any(_covers(kept, key) for kept in self.kept for key in new)
        return None if is_kept else new

    def options(self, role: str, passes: Change, beside: bool, turns: bool) -> list[Option]:
        """Return what a role may be given.

        Args:
            role: one that needs GPUs.
            passes: see `passes`.
            beside: whether it shares GPUs with a generator.
            turns: whether sides take turns.
        """
        read = {"policy": [*passes.values()], "generator": []}  # others: the size of a pass
        key = (role, *read.get(role, [passes[PASS_KEY]]), beside, turns)
        if key not in self._options:
            base = copied(self.config, {**passes, "placement.turns": turns})
            changes = map(self.differing, _role_changes(self, role, turns))
            self._options[key] = [
                _option(self, role, copied(base, change), change, beside)
                for change in changes
                if change is not None
            ]
        return self._options[key]


def _covers(kept: str, key: str) -> bool:
    """Return whether a change of a key would change what is kept; a section is all of its keys."""
    if kept == "placement.gpus" and key.startswith("placement.") and key.endswith(".gpus"):
        return True
    return key == kept or key.startswith(f"{kept}.") or kept.startswith(f"{key}.")


def _value(config: Config, key: str) -> object:
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else getattr(value, name)
    return value


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


def copied(config: Config, change: Change) -> Config:
    """Return the config with a change, not validated: for one of many that are compared."""
    for key, value in change.items():
        config = _with(config, key.split("."), value)
    return config


def _with(section: Any, path: Sequence[str], value: object) -> Any:
    name, *rest = path
    if isinstance(section, Mapping):
        return {**section, name: value}
    new = _with(getattr(section, name), rest, value) if rest else value
    return section.model_copy(update={name: new})


def passes(space: Space) -> Iterator[Change]:
    """Yield changes of the reference's kind and of the size of a pass, the largest first."""
    config = space.config
    tokens = config.ppo.max_tokens_per_micro_batch
    longest = config.rollout.max_prompt_tokens + config.rollout.max_tokens
    sizes = [tokens]
    while sizes[-1] > longest:
        sizes.append(max(sizes[-1] // 2, longest))
    if 3 in (config.policy.zero_stage, config.critic.zero_stage):
        sizes = [4 * tokens, 2 * tokens, *sizes]  # weights are gathered for each pass
    own = {"reference.kind": "own"}
    base = {"reference.kind": "policy_base", "reference.num_workers": 1}
    for kind, size in product((own, base), sizes):
        change = {**kind, PASS_KEY: size}
        if space.differing(change) is not None:
            yield change


def sharings(space: Space, config: Config) -> list[Sharing]:
    """Return the ways in which a config's roles may share GPUs."""
    roles = _on_gpus(config)
    is_whole = config.model.quantization == "none"
    found: list[Sharing] = []
    seen: set[object] = set()
    for sets in SHARED:
        shared = [pool for pool in (_among(roles, members) for members in sets) if len(pool) > 1]
        together = {role for pool in shared for role in pool}
        alone = _alone([role for role in roles if role not in together])
        pools: tuple[Roles, ...] = (*shared, *alone)
        may_turn = is_whole and any({"policy", "generator"} <= {*pool} for pool in shared)
        for turns in (False, True) if may_turn else (False,):
            change = space.differing(_placement(space, pools, turns))
            if change is not None and (pools, turns) not in seen:
                seen.add((pools, turns))
                found.append(Sharing(pools, turns, change))
    if not any(sharing.change == {} for sharing in found):
        found.append(Sharing(_given_pools(config), config.placement.turns, {}, is_given=True))
    return found


def _placement(space: Space, pools: Sequence[Sequence[Role]], turns: bool) -> Change:
    """Return the keys that make roles share GPUs, or have them alone."""
    placement = space.config.placement
    shared = [[*pool] for pool in pools if len(pool) > 1]
    change: dict[str, object] = {
        "placement.turns": turns,
        "placement.share": shared if len(shared) > 1 else [],
    }
    for pool in pools:
        for role, part in _parts(pool).items():
            if placement.gpus_of(role) != part:
                change[f"placement.{role}.gpus"] = part
    if not any("generator" in pool for pool in shared):
        limits_engine = "gpu_memory_utilization" in space.config.rollout.engine_args
        if placement.gpus_of("generator") < 1 and limits_engine:
            change[UTILIZATION_KEY] = UTILIZATION
    elif any(key in node.labels for key in placement.generator.labels for node in space.nodes):
        change["placement.generator.labels"] = placement.policy.labels
    return change


def _parts(pool: Sequence[Role]) -> dict[Role, float]:
    """Return the part of a GPU of each role's worker, so that one of each fills it."""
    parts: dict[Role, float] = {role: LEARNER_PART for role in pool if role in LEARNERS}
    others: list[Role] = [role for role in pool if role not in LEARNERS]
    if len(pool) == 1:
        parts, others = {}, [*pool]
    left = 1 - sum(parts.values())
    for role in others:
        parts[role] = round(left if role is others[-1] else left * NEXT_PART, 2)
        left -= parts[role]
    return parts


def _on_gpus(config: Config) -> list[Role]:
    """Return the roles that need GPUs."""
    needing = {demand.role for demand in demands(config) if demand.gpus}
    return [role for role in get_args(Role) if role in needing]


def _given_pools(config: Config) -> tuple[Roles, ...]:
    """Return the roles that share GPUs as configured, so far as one of each fits on one GPU."""
    placement, sets = config.placement, dict[object, list[Role]]()
    for role in _on_gpus(config):
        has_whole = placement.gpus_of(role) == 1
        sets.setdefault(role if has_whole else placement.sharers(role), []).append(role)
    pools: list[Roles] = []
    for members in sets.values():
        fills = sum(map(placement.gpus_of, members)) <= 1
        pools += [_among(members, members)] if fills else _alone(members)
    return tuple(pools)


def _among(roles: Sequence[Role], members: Sequence[Role]) -> Roles:
    return tuple(role for role in members if role in roles)


def _alone(roles: Sequence[Role]) -> list[Roles]:
    return [(role,) for role in roles]


def _role_changes(space: Space, role: str, turns: bool) -> Iterator[Change]:
    """Yield what gives a role each number of workers that may be best, and each way to work."""
    config, key = space.config, WORKERS_KEY[role]
    if role in LEARNERS:
        stage = getattr(config, role).zero_stage
        stages = (stage,) if stage < 3 else (2,) if turns else (2, 3)  # whole weights can sleep
        size = config.ppo.mini_batch_size
        for ranks, recomputes, stage in product(range(1, size + 1), (False, True), stages):
            if ranks <= space.gpus and size % ranks == 0:
                yield {
                    key: ranks,
                    f"{role}.gradient_checkpointing": recomputes,
                    f"{role}.zero_stage": stage,
                }
    elif role == "generator":
        for size in _parallel_sizes(space):
            most = sum(node.gpus // size for node in space.nodes)
            for number in _useful_counts(config, config.generators.num, most):
                if _may_start(config, number):
                    yield {key: number, "generators.tensor_parallel_size": size}
    else:
        given = getattr(config, role).num_workers
        for number in _useful_counts(config, given, space.gpus):
            yield {key: number}


def _useful_counts(config: Config, given: int, most: int) -> list[int]:
    """Return the numbers of workers of which no smaller one has the same most shards a worker."""
    shards = num_shards(config)
    counts = {math.ceil(shards / each) for each in range(1, shards + 1)} | {given}
    return sorted(count for count in counts if count <= most)


def _parallel_sizes(space: Space) -> list[int]:
    """Return the numbers of GPUs that vLLM can divide the model among."""
    config, shape = space.config, space.models.tuned.shape
    sizes = [1]
    if config.rollout.engine == "vllm" and config.rollout.serving != "merged":
        largest = max(node.gpus for node in space.nodes)
        sizes += [2**power for power in range(1, largest.bit_length()) if 2**power <= largest]
    given = config.generators.tensor_parallel_size
    return sorted({size for size in sizes if _divides(shape, size)} | {given})


def _divides(shape: Shape, size: int) -> bool:
    heads = shape.num_kv_heads
    whole_heads = heads % size == 0 or size % heads == 0
    return whole_heads and shape.num_heads % size == 0 and shape.intermediate_size % size == 0


def _may_start(config: Config, number: int) -> bool:
    bounds = config.rollout.autoscale
    return bounds is None or bounds.minimum <= number <= bounds.maximum


def _option(space: Space, role: str, config: Config, change: Change, beside: bool) -> Option:
    demand = next(demand for demand in demands(config) if demand.role == role)
    whole = demand.workers * max(1, math.ceil(demand.gpus))
    setting = Setting(config, space.models, {role: space.kind(whole)})
    held, least = planned_role(setting, demand), 0.0
    if role == "generator":
        one = config.model.max_length * engine(setting).token_bytes
        least = held.total - held.parts["KV cache"] + one
    working = role_seconds(setting, role, is_beside_generator=beside)
    moved = turn_seconds(2 * held.parts["weights"] * config.placement.turns)
    sides = (moved, (0.0, 0.0)) if role == "generator" else ((0.0, 0.0), moved)
    if role not in COLOCATED_GROUPS:
        sides = ((0.0, 0.0),) * 2
    seconds = (*(working[phase] for phase in WORKING_PHASES), *sides)
    return Option(change, whole, held, least, tuple(end for ends in seconds for end in ends))
