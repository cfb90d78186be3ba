"""The search for the best layouts of a job: numbers of workers, ways to work, who shares GPUs.

Every combination gets a lower bound of its seconds from roles that were planned alone. Those that
could be better than what was found so far are planned as a whole, the fastest first: where all
GPUs are of one kind, none that is better is missed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product

from rlhf_ray.errors import ConfigError
from rlhf_ray.placement.layout import Slot, demands
from rlhf_ray.planning.layout_options import (
    LEARNERS,
    UTILIZATION_KEY,
    Change,
    Option,
    Seconds,
    Sharing,
    Space,
    changed,
    copied,
    passes,
    sharings,
)
from rlhf_ray.planning.memory import GB
from rlhf_ray.planning.prediction import KEPT_ASLEEP, Plan, prediction, usable_bytes
from rlhf_ray.planning.roles import UTILIZATION, PlannedRole, Setting
from rlhf_ray.planning.throughput import fixed_phases, iteration_seconds, middle

STEP = 0.05
"""Step of the shares of a GPU's memory that an engine gets where others share its GPU. One step is
left free there, because what several processes need is not known to a percent."""
ROUNDING = 1e-9
MOST_PLANNED = 400
"""Most layouts that are planned as a whole; bounds are loose where kinds of GPUs differ."""

Costs = tuple[float, float]
"""Seconds and GPU-seconds of an iteration, at the range's midpoint."""
Found = tuple[Change, Plan]


@dataclass(frozen=True)
class Pool:
    """Roles on the same GPUs, or several such sets of roles."""

    changes: tuple[Change, ...]
    gpus: float
    seconds: Seconds

    @property
    def order(self) -> tuple[float, float, int]:
        """Seconds, then GPUs, then the number of changed keys."""
        return sum(self.seconds), self.gpus, sum(map(len, self.changes))

    def covers(self, other: "Pool") -> bool:
        """Return whether it takes no more GPUs and is nowhere slower."""
        return self.gpus <= other.gpus and all(map(float.__le__, self.seconds, other.seconds))


def costs_of(plan: Plan) -> Costs:
    """Return the costs of a plan whose time is known."""
    assert plan.time is not None
    seconds = middle(plan.time.iteration)
    return seconds, seconds * len(gpus_of(plan.places))


def no_worse(one: Costs, other: Costs, slack: float = ROUNDING) -> bool:
    """Return whether one exceeds the other in neither by more than a share of it."""
    return all(mine <= its * (1 + slack) for mine, its in zip(one, other, strict=True))


def gpus_of(places: Sequence[Slot], *roles: str) -> set[tuple[int, int]]:
    """Return (node, index) of the GPUs of some roles, or of all roles if none is named."""
    return {(p.node, gpu) for p in places if not roles or p.role in roles for gpu in p.gpus}


def front(space: Space, known: Sequence[Costs], slack: float, may_be_late: bool) -> list[Found]:
    """Return the layouts than which none is better in both costs, fastest first.

    Args:
        space: what to search.
        known: costs of other layouts.
        slack: share that a layout must save over each of them, in one of the costs.
        may_be_late: whether calls may miss their deadline at the predicted worst.
    """
    found: list[Found] = []
    num_planned = 0
    for costs, _, changes in sorted(_candidates(space), key=lambda each: each[:2]):
        if num_planned == MOST_PLANNED:
            break
        if _is_beaten(costs, known, slack) or _is_beaten(costs, map(_costs, found), ROUNDING):
            continue
        change = {key: value for part in changes for key, value in part.items()}
        num_planned += 1
        plan = planned(space, change, may_be_late)
        if plan is None or _is_beaten(costs_of(plan), known, slack):
            continue
        others = [each for each in found if not no_worse(costs_of(plan), _costs(each))]
        is_better = not _is_beaten(costs_of(plan), map(_costs, others), ROUNDING)
        if is_better and is_valid(space, change):
            found = [*others, (change, plan)]
    return sorted(found, key=_costs)


def _costs(found: Found) -> Costs:
    return costs_of(found[1])


def planned(space: Space, change: Change, may_be_late: bool) -> Plan | None:
    """Return the plan of a layout; None if it does not fit or may be late."""
    config = copied(space.config, change)
    needed = sum(demand.workers * demand.gpus for demand in demands(config))
    if needed > space.gpus * (1 + ROUNDING):
        return None  # at once: a plan would also look for what fits instead
    plan = prediction(config, space.nodes)
    is_late = plan.late_calls is not None and not may_be_late
    if not plan.fits or plan.time is None or is_late or not _sleepers_share(plan):
        return None
    return plan


def is_valid(space: Space, change: Change) -> bool:
    """Return whether the config may have a change."""
    try:
        changed(space.config, change)
    except ConfigError:
        return False
    return True


def _sleepers_share(plan: Plan) -> bool:
    """True unless colocated generators are on GPUs without a learner."""
    if not plan.config.placement.turns:
        return True
    return gpus_of(plan.places, "generator") <= gpus_of(plan.places, *LEARNERS)


def _candidates(space: Space) -> Iterator[tuple[Costs, int, tuple[Change, ...]]]:
    """Yield the least costs, the number of changed keys and the changes of every combination."""
    fixed = fixed_phases(Setting(space.config, space.models, {}))
    always = sum(map(middle, fixed.values()))
    before: dict[object, object] = {}
    for change in passes(space):
        own = Pool((space.differing(change) or {},), 0, ())
        for sharing in sharings(space, copied(space.config, change)):
            pools = [_pools(space, sharing, members, change) for members in sharing.pools]
            key = (change["reference.kind"], sharing.pools, sharing.turns)
            if before.get(key) == pools:
                continue  # smaller passes are no faster
            before[key] = pools
            for pool in _joined(space, sharing, pools):
                gpus = math.ceil(pool.gpus)
                seconds = _least_seconds(space, always, pool.seconds)
                changes = (*own.changes, sharing.change, *pool.changes)
                yield (seconds, seconds * gpus), sum(map(len, changes)), changes


def _least_seconds(space: Space, always: float, seconds: Seconds) -> float:
    """Return the least seconds of an iteration, whatever roles share GPUs."""
    generating = sum(seconds[:2]) / 2
    phases = {"gen": generating, "others": always + sum(seconds) / 2 - generating}
    return iteration_seconds(phases, is_ahead=space.config.ppo.max_staleness > 0)


def _joined(space: Space, sharing: Sharing, pools: Sequence[list[Pool]]) -> list[Pool]:
    """Return the combinations of pools that the cluster has GPUs for.

    What is worse in all is left out, except for generators: those of several GPUs each may not find
    them on one node.
    """
    with_generators = ["generator" in members for members in sharing.pools]
    rest = [pool for pool, has in zip(pools, with_generators, strict=True) if not has]
    (generators,) = (pool for pool, has in zip(pools, with_generators, strict=True) if has)
    none = Pool((), 0, tuple(0.0 for _ in generators[0].seconds)) if generators else None
    if none is None:
        return []
    others = reduce(lambda one, other: _best(_pairs(space, one, other)), rest, [none])
    return _pairs(space, others, generators)


def _pairs(space: Space, one: Sequence[Pool], other: Sequence[Pool]) -> list[Pool]:
    return [
        Pool(
            (*a.changes, *b.changes),
            a.gpus + b.gpus,
            tuple(map(max, a.seconds, b.seconds)),
        )
        for a, b in product(one, other)
        if math.ceil(a.gpus + b.gpus) <= space.gpus
    ]


def _best(pools: Sequence[Pool]) -> list[Pool]:
    kept: list[Pool] = []
    for pool in sorted(pools, key=lambda pool: pool.order):
        if not any(other.covers(pool) for other in kept):
            kept.append(pool)
    return kept


def _pools(space: Space, sharing: Sharing, members: Sequence[str], change: Change) -> list[Pool]:
    """Return what roles on the same GPUs may be given, if one of each fits on one GPU."""
    beside = len(members) > 1 and "generator" in members
    options = [space.options(role, change, beside, sharing.turns) for role in members]
    if len(members) == 1:
        return _fastest(space, sharing, options[0])
    sizes = sorted({option.gpus for each in options for option in each})
    found: list[Pool] = []
    for held in (held for size in sizes for held in product(*(_most(o, size) for o in options))):
        shared = _shared(space, sharing, dict(zip(members, held, strict=True)))
        if shared is not None:
            changes = (*(option.change for option in held), shared)
            seconds = tuple(map(sum, zip(*(option.seconds for option in held), strict=True)))
            found.append(Pool(changes, max(option.gpus for option in held), seconds))
    return found


def _most(options: Sequence[Option], size: int) -> list[Option]:
    """Return those with the most workers on at most so many GPUs: with more workers a role is no
    slower, and each needs no more memory."""
    fitting = [option for option in options if option.gpus <= size]
    most = max((option.gpus for option in fitting), default=0)
    return [option for option in fitting if option.gpus == most]


def _fastest(space: Space, sharing: Sharing, options: Sequence[Option]) -> list[Pool]:
    """Return, of each number of GPUs and workers, the fastest way to work that fits."""
    best: dict[object, Pool] = {}
    for option in options:
        role, usable = option.held, usable_bytes(space.kind(option.gpus))
        gpus = role.workers * role.gpus if sharing.is_given else option.gpus
        pool, key = Pool((option.change,), gpus, option.seconds), (gpus, role.workers)
        fits = option.least <= role.total and role.peak <= usable
        if fits and (key not in best or pool.order < best[key].order):
            best[key] = pool
    return [*best.values()]


def _shared(space: Space, sharing: Sharing, held: Mapping[str, Option]) -> Change | None:
    """Return the engine's share of a GPU that others are on as well; None if they don't fit."""
    kind = space.kind(max(option.gpus for option in held.values()))
    memory = kind.memory_gb * GB
    usable = usable_bytes(kind) - STEP * memory * (not sharing.is_given)
    others = [option.held for role, option in held.items() if role != "generator"]
    awake = sum(role.peak for role in others)
    generator = held.get("generator")
    if generator is None:
        return {} if awake <= usable else None
    if generator.gpus > generator.held.workers:
        return None  # an engine of several GPUs needs whole ones
    beside = awake
    if sharing.turns:
        if generator.held.workers > held["policy"].held.workers:
            return None
        beside = sum(_asleep(role) if role.role in LEARNERS else role.peak for role in others)
        if awake + _asleep(generator.held) > usable:
            return None
    share = math.floor((usable - beside) / memory / STEP) * STEP
    change = space.differing({UTILIZATION_KEY: round(share, 2)})
    if change is None or sharing.is_given:
        share = space.config.rollout.engine_args.get("gpu_memory_utilization", UTILIZATION)
        change = {}
    fits = generator.least <= share * memory <= usable - beside
    return change if fits else None


def _asleep(role: PlannedRole) -> float:
    return sum(role.parts.get(part, 0) for part in KEPT_ASLEEP)


def _is_beaten(costs: Costs, others: Iterator[Costs] | Sequence[Costs], slack: float) -> bool:
    return any(no_worse(other, costs, slack) for other in others)
