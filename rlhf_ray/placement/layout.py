"""Who sits on which GPU: pure arithmetic on a config and the shapes of nodes, without Ray."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rlhf_ray.config import Config
from rlhf_ray.config.placement import Role
from rlhf_ray.config.rewards import ClassifierSourceConfig, ModelSourceConfig
from rlhf_ray.errors import PlacementError

RUN_MODELS = (ModelSourceConfig, ClassifierSourceConfig)
"""Sources that compute in the scorer's own process, and want a GPU there."""

WORKERS_KEY: Mapping[str, str] = {
    "policy": "policy.num_ranks",
    "critic": "critic.num_ranks",
    "reference": "reference.num_workers",
    "reward": "reward.num_workers",
    "generator": "generators.num",
}
"""Role -> the key that says how many workers it has."""

WHOLE = 10_000
"""A GPU in the smallest parts that Ray counts."""


@dataclass(frozen=True)
class Node:
    """One machine of a cluster."""

    name: str
    """What people call it: its address in a live cluster, ``node-0`` in a planned one."""
    gpus: int
    labels: Mapping[str, str] = field(default_factory=dict)
    """Ray's node labels, e.g. ``{"role": "rollout"}``."""
    gpu_kind: str | None = None
    """A name of `cluster.hardware`, such as ``A100-80GB``; None: not known."""


@dataclass(frozen=True)
class Demand:
    """What the workers of one role need."""

    role: str
    """``policy``, ``critic``, ``reference``, ``reward`` or ``generator``."""
    workers: int
    gpus: float
    """Of one worker: a part of one that is shared, or a whole number of one node."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels that its nodes must carry; one that no node carries: nodes without that label."""
    is_group: bool = False
    """Whether its workers talk to each other all the time: packed on as few nodes as can be, ranks
    of a node in order, never two on one GPU."""
    sharers: frozenset[str] | None = None
    """Roles that may be on the same GPU, itself among them; None: any."""

    @property
    def parts(self) -> int:
        """What one worker takes of each of its GPUs, in parts of `WHOLE`."""
        return round(min(self.gpus, 1) * WHOLE)


@dataclass(frozen=True)
class Place:
    """Where one worker sits."""

    role: str
    rank: int
    node: int
    """Index of the node."""
    gpus: tuple[int, ...]
    """Indices of its GPUs on that node; empty: it needs none."""
    share: float
    """GPUs that it holds: their number, or a part of one."""


def demands(config: Config) -> list[Demand]:
    """What PPO's roles need, those without workers left out.

    A custom advantage estimator is taken to need a critic: only its code could say.
    """
    runs_models = any(isinstance(source, RUN_MODELS) for source in config.rewards)
    whole = config.generators.tensor_parallel_size
    workers: dict[Role, int] = {
        "policy": config.policy.num_ranks,
        "critic": config.critic.num_ranks if config.may_have_critic else 0,
        "reference": config.reference.num_processes,
        "reward": config.reward.num_workers,
        "generator": config.generators.num,
    }
    asked = {role: config.placement.gpus_of(role) for role in workers}
    asked["reward"] *= runs_models
    asked["generator"] = whole if whole > 1 else asked["generator"]
    return [
        Demand(
            role=role,
            workers=count,
            gpus=asked[role],
            labels=config.placement.of(role).labels,
            is_group=role in ("policy", "critic"),
            sharers=config.placement.sharers(role),
        )
        for role, count in workers.items()
        if count
    ]


def lay_out(demands: Sequence[Demand], nodes: Sequence[Node]) -> list[Place]:
    """A place for every worker, in the order of the demands and their ranks.

    What is hardest to seat comes first: learner groups and engines of several GPUs. A role goes
    onto the node that has least room to spare after it, or else onto as few nodes as can be.

    Raises:
        PlacementError: what was asked, what there is, and what would fit.
    """
    places = fit(demands, nodes)
    if places is None:
        raise PlacementError(shortage(demands, nodes))
    return places


@dataclass
class _Gpu:
    """What is left of a GPU, and who is on it."""

    free: int = WHOLE
    roles: list[str] = field(default_factory=list)

    def takes(self, demand: Demand) -> bool:
        """Whether a worker fits in."""
        if demand.parts > self.free or (demand.is_group and demand.role in self.roles):
            return False
        return demand.sharers is None or demand.sharers.issuperset(self.roles)


@dataclass
class _Room:
    """What is left of a node."""

    node: int
    gpus: list[_Gpu]

    @property
    def free(self) -> int:
        return sum(gpu.free for gpu in self.gpus)

    def seat(self, demand: Demand) -> tuple[int, ...] | None:
        """Seat a worker, a part of a GPU on the fullest that takes it; None: no room."""
        fitting = [index for index, gpu in enumerate(self.gpus) if gpu.takes(demand)]
        fitting.sort(key=lambda index: self.gpus[index].free)
        needed = math.ceil(demand.gpus)
        if len(fitting) < needed:
            return None
        for index in fitting[:needed]:
            self.gpus[index].free -= demand.parts
            self.gpus[index].roles.append(demand.role)
        return tuple(fitting[:needed])

    def capacity(self, demand: Demand) -> int:
        """How many of its workers fit, at most as many as there are."""
        trial = _Room(self.node, [_Gpu(gpu.free, [*gpu.roles]) for gpu in self.gpus])
        seats = (trial.seat(demand) for _ in range(demand.workers))
        return sum(1 for _ in itertools.takewhile(lambda seat: seat is not None, seats))


def fit(demands: Sequence[Demand], nodes: Sequence[Node]) -> list[Place] | None:
    """What `lay_out` gives, or None where there is no room."""
    rooms = [_Room(i, [_Gpu() for _ in range(node.gpus)]) for i, node in enumerate(nodes)]
    seated: dict[str, list[Place]] = {}
    for demand in sorted(demands, key=lambda d: _hardness(d, nodes), reverse=True):
        eligible = set(_eligible(demand, nodes))
        places = list(_seat_all(demand, [room for room in rooms if room.node in eligible]))
        if len(places) < demand.workers:
            return None
        seated[demand.role] = places
    return [place for demand in demands for place in seated[demand.role]]


def _hardness(demand: Demand, nodes: Sequence[Node]) -> tuple[int, float, float]:
    """Fewer nodes to choose from, the larger piece on one node, and the more in all."""
    total = demand.gpus * demand.workers
    return -len(_eligible(demand, nodes)), total if demand.is_group else demand.gpus, total


def _eligible(demand: Demand, nodes: Sequence[Node]) -> list[int]:
    """Nodes with GPUs that carry its labels."""
    found = [index for index, node in enumerate(nodes) if node.gpus]
    for key, value in demand.labels.items():
        is_carried = any(node.labels.get(key) == value for node in nodes)
        wanted = value if is_carried else None
        found = [index for index in found if nodes[index].labels.get(key) == wanted]
    return found


def _seat_all(demand: Demand, rooms: Sequence[_Room]) -> Iterator[Place]:
    """Places of its workers, as long as there is room."""
    rank = 0
    while rank < demand.workers:
        left = replace(demand, workers=demand.workers - rank)
        room = min(rooms, key=lambda room: _preference(room, left), default=None)
        count = room.capacity(left) if room else 0
        if room is None or not count:
            return
        for _ in range(count):
            gpus = room.seat(demand)
            assert gpus is not None
            yield Place(demand.role, rank, room.node, gpus, demand.gpus)
            rank += 1


def _preference(room: _Room, demand: Demand) -> tuple[int, int, int]:
    """Smallest first: as many as can be of its workers on one node, the fullest of equal ones."""
    return -room.capacity(demand), room.free, room.node


def shortage(demands: Sequence[Demand], nodes: Sequence[Node]) -> str:
    """What was asked, what there is, and what would fit, of demands that do not."""
    return f"{asked_and_there(demands, nodes)}. {what_would_fit(demands, nodes)}"


def asked_and_there(demands: Sequence[Demand], nodes: Sequence[Node]) -> str:
    """The first half of a `shortage`."""
    asked = ", ".join(f"{d.role} {d.workers} x {d.gpus:g}{_listed(d.labels)}" for d in demands)
    total = sum(d.workers * d.gpus for d in demands)
    there = ", ".join(f"{node.name} {node.gpus}{_listed(node.labels)}" for node in nodes)
    return (
        f"The cluster has no room for every role. Asked, workers x GPUs: {asked}; in all "
        f"{total:g}. "
        f"There: {there or 'no node'}; in all {sum(node.gpus for node in nodes)}"
    )


def what_would_fit(demands: Sequence[Demand], nodes: Sequence[Node]) -> str:
    """Its second half."""
    return f"It would fit with {' or '.join(_remedies(demands, nodes)) or 'fewer roles'}"


def _listed(labels: Mapping[str, str]) -> str:
    listed = ", ".join(f"{key}={value}" for key, value in labels.items())
    return f" ({listed})" if listed else ""


def _remedies(demands: Sequence[Demand], nodes: Sequence[Node]) -> list[str]:
    """The smallest change of each kind with which it fits."""
    found = (
        _with_fewer(demands, nodes) or _with_smaller(demands, nodes),
        _without_labels(demands, nodes),
        _with_more(demands, nodes),
    )
    return [remedy for remedy in found if remedy]


def _with_fewer(demands: Sequence[Demand], nodes: Sequence[Node]) -> str | None:
    """Fewer workers of the role that gives up least.

    A group keeps a divisor of its ranks, as batches are divided among them.
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
    """Engines of fewer GPUs, or else parts of GPUs."""
    largest = max(demand.gpus for demand in demands)
    options = [largest / 2**halvings for halvings in range(1, int(largest).bit_length())]
    if largest <= 1:
        options = [int(WHOLE / sharers) / WHOLE for sharers in range(2, 11)]
    key = "placement.gpus" if largest <= 1 else "generators.tensor_parallel_size"
    for gpus in options:
        if fit([replace(d, gpus=min(d.gpus, gpus)) for d in demands], nodes):
            return f"{key}={gpus:g}"
    return None


def _without_labels(demands: Sequence[Demand], nodes: Sequence[Node]) -> str | None:
    for demand in demands:
        anywhere = replace(demand, labels={})
        if fit([anywhere if d is demand else d for d in demands], nodes):
            return f"placement.{demand.role}.labels={{}}"
    return None


def _with_more(demands: Sequence[Demand], nodes: Sequence[Node]) -> str | None:
    """More nodes as large as the largest, labelled as some node is; eight GPUs, where none is."""
    gpus = max((node.gpus for node in nodes), default=0) or 8
    kinds = list(dict.fromkeys(tuple(node.labels.items()) for node in nodes)) or [()]
    for number in range(1, sum(demand.workers for demand in demands) + 1):
        for labels in map(dict, kinds):
            if fit(demands, [*nodes, *[Node("", gpus, labels)] * number]):
                node = f"{number} more node{'s' * (number > 1)} of {gpus} GPU{'s' * (gpus > 1)}"
                return node + _listed(labels)
    return None
