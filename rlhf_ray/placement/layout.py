"""The layout: which worker gets which GPUs, from a config and the shapes of nodes, without Ray.

Roles are placed greedily, those that are hardest to place first; each goes onto the node that holds
the most of its workers and has the least free capacity.
"""

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rlhf_ray.config import Config
from rlhf_ray.config.cluster import Role
from rlhf_ray.config.rewards import ClassifierSourceConfig, ModelSourceConfig
from rlhf_ray.config.stages import SUPERVISED
from rlhf_ray.errors import PlacementError

RUN_MODELS = (ModelSourceConfig, ClassifierSourceConfig)
"""Reward sources that run a model in the scorer's own process, and need a GPU there."""

WORKERS_KEY: Mapping[str, str] = {
    "policy": "policy.num_ranks",
    "critic": "critic.num_ranks",
    "reference": "reference.num_workers",
    "reward": "reward.num_workers",
    "generator": "generators.num",
    "pretrain": "pretrain.train_workers",
    "sft": "sft.train_workers",
    "reward_model": "reward.train_workers",
    "dpo": "dpo.train_workers",
}
"""Role, or what a supervised stage trains -> the config key with its number of workers."""

WHOLE = 10_000
"""One GPU in the smallest fractions that Ray counts; integers, so that fractions add up exactly."""

PARTS = tuple(int(WHOLE / sharers) / WHOLE for sharers in range(2, 11))
"""Parts of a GPU for 2 to 10 workers, rounded down: three of 0.3334 would not fit on one."""


@dataclass(frozen=True)
class Node:
    """One machine of a cluster."""

    name: str
    """Its address in a live cluster, ``node-0`` and so on in a planned one."""
    gpus: int
    labels: Mapping[str, str] = field(default_factory=dict)
    """Ray's node labels, e.g. ``{"role": "rollout"}``."""
    gpu_kind: str | None = None
    """A key of `hardware.GPU_KINDS`, such as ``A100-80GB``; None if unknown."""
    gpu_memory_gb: float | None = None
    """Memory of the smallest of its GPUs, 10^9 bytes, as measured; None if it was not."""
    has_bf16: bool = True
    """Whether GPUs of an unknown kind compute in bfloat16; True if that was not measured."""


@dataclass(frozen=True)
class Demand:
    """Request of the workers of one role."""

    role: str
    """``policy``, ``critic``, ``reference``, ``reward`` or ``generator``."""
    workers: int
    gpus: float
    """Per worker: a fraction of a shared GPU, or a whole number of GPUs of one node."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels that its nodes must carry. If no node has a label's value, nodes without that label
    are used: a config with labels then fits an unlabelled cluster."""
    is_group: bool = False
    """Whether its workers communicate all the time: packed on as few nodes as possible, the ranks
    of a node in order, never two on one GPU (NCCL refuses that)."""
    sharers: frozenset[str] | None = None
    """Roles that may share a GPU with it, itself included; None: any."""

    @property
    def units(self) -> int:
        """Part of each of its GPUs that one worker takes, in units of 1 / `WHOLE`."""
        return round(min(self.gpus, 1) * WHOLE)


@dataclass(frozen=True)
class Slot:
    """The GPUs of one worker."""

    role: str
    rank: int
    node: int
    """Index of the node."""
    gpus: tuple[int, ...]
    """Indices of its GPUs on that node; empty if it needs none."""
    share: float
    """How many GPUs it holds: their number, or a fraction of one."""


def demands(config: Config) -> list[Demand]:
    """Return the demands of PPO's roles; roles without workers are left out.

    A custom advantage estimator counts as one with a critic, because only its code knows.
    """
    runs_models = any(isinstance(source, RUN_MODELS) for source in config.rewards)
    workers: dict[Role, int] = {
        "policy": config.policy.num_ranks,
        "critic": config.critic.num_ranks if config.may_have_critic else 0,
        "reference": config.reference.num_processes,
        "reward": config.reward.num_workers,
        "generator": config.generators.num,
    }
    gpus: dict[Role, float] = {role: config.placement.gpus_of(role) for role in workers}
    gpus["reward"] *= runs_models
    if config.generators.tensor_parallel_size > 1:
        gpus["generator"] = config.generators.tensor_parallel_size
    return [
        Demand(
            role=role,
            workers=count,
            gpus=gpus[role],
            labels=config.placement.of(role).labels,
            is_group=role in ("policy", "critic"),
            sharers=config.placement.sharers(role),
        )
        for role, count in workers.items()
        if count
    ]


def held_at_once(config: Config, stages: Collection[str]) -> dict[str, list[Demand]]:
    """Return what holds GPUs together, in order; each frees them before the next begins."""
    trained = {"reward": "reward_model"}  # the scorers are called reward
    whole = float(config.placement.gpus != 0)
    held = {
        stage: [Demand(trained.get(stage, stage), getattr(config, stage).train_workers, whole)]
        for stage in SUPERVISED
        if stage in stages and config.external_model(stage) is None
    }
    asked = demands(config)
    if "ppo" in stages:
        held["ppo"] = asked
    if "rank" in stages:
        held["rank"] = [d for d in asked if d.role == "generator"]
    if "evaluate" in stages:
        held["evaluate"] = [d for d in asked if d.role in ("generator", "reward")]
        placement = config.placement  # the worker needs what a reference needs
        gpus, labels = placement.gpus_of("reference"), placement.reference.labels
        held["perplexity"] = [Demand("likelihood", 1, gpus, labels)]
    return held


def lay_out(demands: Sequence[Demand], nodes: Sequence[Node]) -> list[Slot]:
    """Return a slot for every worker, in the order of the demands and their ranks.

    Raises:
        PlacementError: they do not fit; says what is requested, what is available, what would fit.
    """
    slots = fit(demands, nodes)
    if slots is None:
        raise PlacementError(shortage(demands, nodes))
    return slots


@dataclass
class _Gpu:
    """The free fraction of a GPU, and the roles on it."""

    free: int = WHOLE
    roles: list[str] = field(default_factory=list)

    def takes(self, demand: Demand) -> bool:
        """Return whether a worker of this demand fits."""
        if demand.units > self.free or (demand.is_group and demand.role in self.roles):
            return False
        return demand.sharers is None or demand.sharers.issuperset(self.roles)


@dataclass
class _Capacity:
    """The free capacity of a node."""

    node: int
    gpus: list[_Gpu]

    @property
    def free(self) -> int:
        return sum(gpu.free for gpu in self.gpus)

    def take(self, demand: Demand) -> tuple[int, ...] | None:
        """Place a worker on the fullest GPUs that take it; None if it does not fit."""
        fitting = [index for index, gpu in enumerate(self.gpus) if gpu.takes(demand)]
        fitting.sort(key=lambda index: self.gpus[index].free)
        needed = math.ceil(demand.gpus)
        if len(fitting) < needed:
            return None
        for index in fitting[:needed]:
            self.gpus[index].free -= demand.units
            self.gpus[index].roles.append(demand.role)
        return tuple(fitting[:needed])

    def capacity(self, demand: Demand) -> int:
        """Return how many of a demand's workers fit, at most all of them."""
        trial = _Capacity(self.node, [_Gpu(gpu.free, [*gpu.roles]) for gpu in self.gpus])
        slots = (trial.take(demand) for _ in range(demand.workers))
        return sum(1 for _ in itertools.takewhile(lambda slot: slot is not None, slots))


def fit(demands: Sequence[Demand], nodes: Sequence[Node]) -> list[Slot] | None:
    """Return what `lay_out` does, or None if the workers do not fit."""
    capacities = [_Capacity(i, [_Gpu() for _ in range(node.gpus)]) for i, node in enumerate(nodes)]
    placed: dict[str, list[Slot]] = {}
    for demand in sorted(demands, key=lambda d: _hardness(d, nodes), reverse=True):
        eligible = set(_eligible(demand, nodes))
        slots = list(_place(demand, [node for node in capacities if node.node in eligible]))
        if len(slots) < demand.workers:
            return None
        placed[demand.role] = slots
    return [slot for demand in demands for slot in placed[demand.role]]


def _hardness(demand: Demand, nodes: Sequence[Node]) -> tuple[int, float, float]:
    """Harder: fewer eligible nodes, then a larger piece on one node, then more GPUs in total."""
    total = demand.gpus * demand.workers
    return -len(_eligible(demand, nodes)), total if demand.is_group else demand.gpus, total


def _eligible(demand: Demand, nodes: Sequence[Node]) -> list[int]:
    """Return the indices of nodes with GPUs and the demand's labels."""
    eligible = [index for index, node in enumerate(nodes) if node.gpus]
    for key, value in demand.labels.items():
        exists = any(node.labels.get(key) == value for node in nodes)
        required = value if exists else None
        eligible = [index for index in eligible if nodes[index].labels.get(key) == required]
    return eligible


def _place(demand: Demand, nodes: Sequence[_Capacity]) -> Iterator[Slot]:
    """Yield slots for the demand's workers, until no node has capacity."""
    rank = 0
    while rank < demand.workers:
        rest = replace(demand, workers=demand.workers - rank)
        best = min(nodes, key=lambda node: _preference(node, rest), default=None)
        count = best.capacity(rest) if best else 0
        if best is None or not count:
            return
        for _ in range(count):
            gpus = best.take(demand)
            assert gpus is not None
            yield Slot(demand.role, rank, best.node, gpus, demand.gpus)
            rank += 1


def _preference(node: _Capacity, demand: Demand) -> tuple[int, int, int]:
    """Smallest first: the node that takes most of the workers, among equals the fullest one."""
    return -node.capacity(demand), node.free, node.node


def shortage(demands: Sequence[Demand], nodes: Sequence[Node]) -> str:
    """Say what is requested, what is available and what would fit, for demands that do not fit."""
    return f"{request_and_capacity(demands, nodes)}. {what_fits(demands, nodes)}"


def request_and_capacity(demands: Sequence[Demand], nodes: Sequence[Node]) -> str:
    """Return the first half of a `shortage`."""
    requested = ", ".join(f"{d.role} {d.workers} x {d.gpus:g}{_listed(d.labels)}" for d in demands)
    total = sum(d.workers * d.gpus for d in demands)
    available = ", ".join(f"{node.name} {node.gpus}{_listed(node.labels)}" for node in nodes)
    return (
        f"The roles do not fit on the cluster. Requested, workers x GPUs: {requested}; in total "
        f"{total:g}. "
        f"Available: {available or 'no node'}; in total {sum(node.gpus for node in nodes)}"
    )


def what_fits(demands: Sequence[Demand], nodes: Sequence[Node]) -> str:
    """Return the second half of a `shortage`."""
    return f"It would fit with {' or '.join(_suggestions(demands, nodes)) or 'fewer roles'}"


def _listed(labels: Mapping[str, str]) -> str:
    listed = ", ".join(f"{key}={value}" for key, value in labels.items())
    return f" ({listed})" if listed else ""


def _suggestions(demands: Sequence[Demand], nodes: Sequence[Node]) -> list[str]:
    """Return the smallest change of each kind with which the demands fit."""
    suggestions = (
        _with_fewer(demands, nodes) or _with_smaller(demands, nodes),
        _without_labels(demands, nodes),
        _with_more(demands, nodes),
    )
    return [suggestion for suggestion in suggestions if suggestion]


def _with_fewer(demands: Sequence[Demand], nodes: Sequence[Node]) -> str | None:
    """Suggest fewer workers of the role that gives up least.

    A learner group's ranks must stay a divisor, because batches are divided among them.
    """
    options = [
        ((demand.workers - count) * demand.gpus, f"{WORKERS_KEY[demand.role]}={count}")
        for demand in demands
        for count in range(1, demand.workers)
        if not (demand.is_group and demand.workers % count)
        and fit([replace(d, workers=count) if d is demand else d for d in demands], nodes)
    ]
    return min(options)[1] if options else None


def _with_smaller(demands: Sequence[Demand], nodes: Sequence[Node]) -> str | None:
    """Suggest engines of fewer GPUs, or a fraction of a GPU for each worker."""
    largest = max(demand.gpus for demand in demands)
    options = [largest / 2**halvings for halvings in range(1, int(largest).bit_length())]
    if largest <= 1:
        options = [*PARTS]
    key = "placement.gpus" if largest <= 1 else "generators.tensor_parallel_size"
    for gpus in options:
        if fit([replace(d, gpus=min(d.gpus, gpus)) for d in demands], nodes):
            return f"{key}={gpus:g}"
    return None


def _without_labels(demands: Sequence[Demand], nodes: Sequence[Node]) -> str | None:
    """Suggest to drop a role's labels."""
    for demand in demands:
        anywhere = replace(demand, labels={})
        if fit([anywhere if d is demand else d for d in demands], nodes):
            return f"placement.{demand.role}.labels={{}}"
    return None


def _with_more(demands: Sequence[Demand], nodes: Sequence[Node]) -> str | None:
    """Suggest more nodes like the largest (8 GPUs if there is none), with some node's labels."""
    gpus = max((node.gpus for node in nodes), default=0) or 8
    kinds = list(dict.fromkeys(tuple(node.labels.items()) for node in nodes)) or [()]
    for number in range(1, sum(demand.workers for demand in demands) + 1):
        for labels in map(dict, kinds):
            if fit(demands, [*nodes, *[Node("", gpus, labels)] * number]):
                node = f"{number} more node{'s' * (number > 1)} of {gpus} GPU{'s' * (gpus > 1)}"
                return node + _listed(labels)
    return None
