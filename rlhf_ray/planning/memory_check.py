"""Whether what a run takes is there, and what is short."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rlhf_ray.cluster.colocation import COLOCATED_GROUPS
from rlhf_ray.config import Config
from rlhf_ray.placement.hardware import GPU_KINDS, GpuKind, memory_of_machine
from rlhf_ray.placement.layout import Demand, Node, Slot, request_and_capacity, what_fits
from rlhf_ray.planning.generators import Engine
from rlhf_ray.planning.memory import GB
from rlhf_ray.planning.roles import PlannedRole

USABLE = 0.95
"""Share of a GPU's memory that tensors can have: the allocator's blocks do not fit each other."""
STAYS = ("libraries", "adapter", "gradients", "optimizer", "reduce buffer")
"""Parts that are on a GPU while their side sleeps: what is trained is not moved."""
GPU = 1e15
"""What a GPU that is not there counts, in bytes."""


@dataclass(frozen=True)
class Shortage:
    """One reason why it does not fit."""

    reason: str
    """Who asks for how much of what, and what there is."""
    missing: float
    """Bytes."""
    remedy: str = ""
    """What would make room, as a sentence, where the layout knows; changes of the config that are
    planned say more."""


def no_room(demands: Sequence[Demand], nodes: Sequence[Node]) -> Shortage:
    """No layout has a place for every worker."""
    asked = sum(demand.workers * demand.gpus for demand in demands)
    there = sum(node.gpus for node in nodes)
    return Shortage(
        request_and_capacity(demands, nodes),
        GPU * (1 + max(0, asked - there)),
        remedy=what_fits(demands, nodes),
    )


def smallest_kind(nodes: Iterable[Node]) -> GpuKind | None:
    """The GPUs with the least memory; None where one of them is not known."""
    kinds = {node.gpu_kind for node in nodes if node.gpus}
    known = [GPU_KINDS[kind] for kind in kinds if kind is not None]
    is_known = bool(known) and len(known) == len(kinds)
    return min(known, key=lambda kind: kind.memory_gb) if is_known else None


def on_gpus(
    roles: Iterable[PlannedRole], places: Iterable[Slot]
) -> dict[tuple[int, int], list[PlannedRole]]:
    """Node and GPU -> the role of each worker that is on it."""
    by_name = {role.role: role for role in roles}
    found: dict[tuple[int, int], list[PlannedRole]] = {}
    for place in places:
        for gpu in place.gpus:
            found.setdefault((place.node, gpu), []).append(by_name[place.role])
    return found


def together(held: Iterable[PlannedRole], turns: bool) -> float:
    """Bytes that workers on one GPU have of it at a time.

    Args:
        turns: whether sides take turns, so that of the one that sleeps only what `STAYS` is
            there; others never sleep.
    """
    always, awake = 0.0, dict.fromkeys(COLOCATED_GROUPS.values(), 0.0)
    for role in held:
        if turns and role.role in COLOCATED_GROUPS:
            stays = sum(role.parts.get(part, 0) for part in STAYS)
            always += stays
            awake[COLOCATED_GROUPS[role.role]] += role.peak - stays
        else:
            always += role.peak
    return always + max(awake.values())


def usable_bytes(kind: GpuKind) -> float:
    """Of a GPU of this kind, for tensors."""
    return USABLE * kind.memory_gb * GB


def too_large(
    roles: Iterable[PlannedRole], places: Iterable[Slot], nodes: Sequence[Node], turns: bool
) -> list[Shortage]:
    """GPUs whose workers together take more than there is, one for each set of roles."""
    found: dict[tuple[str, ...], Shortage] = {}
    for (node, _), held in on_gpus(roles, places).items():
        kind = nodes[node].gpu_kind
        if kind is not None and (short := _over(kind, held, turns)):
            found.setdefault((*sorted(role.role for role in held), kind), short)
    return list(found.values())


def stages_too_large(stages: Iterable[PlannedRole], nodes: Sequence[Node]) -> Iterator[Shortage]:
    """Supervised stages that have too few GPUs or too little memory; each runs by itself."""
    gpus = sum(node.gpus for node in nodes)
    kinds = {node.gpu_kind for node in nodes if node.gpus and node.gpu_kind}
    smallest = min(kinds, key=lambda kind: GPU_KINDS[kind].memory_gb, default=None)
    for role in stages:
        if role.workers > gpus:
            section = "reward" if role.role == "reward_model" else role.role
            yield Shortage(
                f"{role.role} has {role.workers} processes ({section}.train_workers) of one GPU "
                f"each, and the cluster {gpus}",
                GPU * (role.workers - gpus),
            )
        if smallest and (short := _over(smallest, [role], turns=False)):
            yield short


def beyond_machine(ppo: Iterable[PlannedRole], stages: Iterable[PlannedRole]) -> Iterator[Shortage]:
    """Without GPUs: what is in memory at the same time, PPO's roles or one stage's processes."""
    there = memory_of_machine()
    needs = {"PPO's roles": sum(role.workers * role.peak for role in ppo)}
    needs |= {f"the processes of {role.role}": role.workers * role.peak for role in stages}
    for who, needed in needs.items():
        if needed > there:
            yield Shortage(
                f"{who} need {needed / GB:,.1f} GB of this machine's {there / GB:,.1f} GB of "
                "memory",
                needed - there,
            )


def no_cache(config: Config, engine: Engine) -> Shortage:
    """A generator's KV cache holds no whole sequence, which its engine refuses."""
    longest, cache = config.model.max_length, engine.parts["KV cache"]
    needed = longest * engine.token_bytes
    return Shortage(
        f"a generator has {cache / GB:,.2f} GB left for its KV cache, and one sequence of "
        f"model.max_length {longest} needs {needed / GB:,.2f} GB on each of its GPUs",
        needed - cache + engine.lacking,
    )


def _over(kind: str, held: Sequence[PlannedRole], turns: bool) -> Shortage | None:
    usable, needed = usable_bytes(GPU_KINDS[kind]), together(held, turns)
    if needed <= usable:
        return None
    largest = max(held, key=lambda role: role.peak)
    return Shortage(
        f"{', '.join(role.role for role in held)} need{'s' if len(held) == 1 else ''} "
        f"{needed / GB:,.1f} GB on one {kind}, which has {usable / GB:,.1f} GB for tensors: "
        f"{_told(largest)}",
        needed - usable,
    )


def _told(role: PlannedRole) -> str:
    """The parts that matter, the largest first."""
    if role.start > role.total:
        return (
            f"the {role.start / GB:,.1f} GB of {role.role}'s weights are whole while it loads, "
            "before ZeRO-3 divides them"
        )
    parts = sorted(role.parts.items(), key=lambda part: -part[1])
    listed = ", ".join(f"{name} {size / GB:,.1f}" for name, size in parts[:3])
    return f"{listed} GB of {role.role}"
