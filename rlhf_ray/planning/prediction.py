"""Estimate the memory, placement and run time of a config, and say what is short."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

from rlhf_ray.cluster.colocation import COLOCATED_GROUPS
from rlhf_ray.config import Config
from rlhf_ray.config.stages import SAMPLING
from rlhf_ray.placement.hardware import GpuKind, kind_of, memory_of_machine
from rlhf_ray.placement.layout import (
    Demand,
    Node,
    Slot,
    demands,
    fit,
    request_and_capacity,
    what_fits,
)
from rlhf_ray.planning.memory import GB
from rlhf_ray.planning.roles import Engine, PlannedRole, Setting, engine, longest_held, ppo_roles
from rlhf_ray.planning.shapes import Models, models_of
from rlhf_ray.planning.throughput import TimeEstimate, estimate_time, late_calls, sync_bytes
from rlhf_ray.planning.trainings import stage_roles, unknown_extents

USABLE = 0.95
"""Share of a GPU's memory that tensors can use; the rest is lost to fragmentation."""
KEPT_ASLEEP = ("libraries", "adapter", "gradients", "optimizer", "reduce buffer")
"""Parts that stay on the GPU while a role sleeps: trained state is not moved."""
MISSING_GPU = 1e15
"""Bytes that a missing GPU counts as, so that it outweighs any shortage of memory."""


@dataclass(frozen=True)
class Shortage:
    """One reason why a config does not fit."""

    reason: str
    """Which role needs how much of what, and what there is."""
    missing: float
    """Bytes that are short."""
    remedy: str = ""
    """What would help, as a sentence; shown where no suggested change of the config fits."""


def _unplaced(demands: Sequence[Demand], nodes: Sequence[Node]) -> Shortage:
    """Return the shortage where no layout places every worker."""
    needed = sum(demand.workers * demand.gpus for demand in demands)
    present = sum(node.gpus for node in nodes)
    return Shortage(
        request_and_capacity(demands, nodes),
        MISSING_GPU * (1 + max(0, needed - present)),
        remedy=what_fits(demands, nodes),
    )


def smallest_kind(nodes: Iterable[Node]) -> GpuKind | None:
    """Return a kind with the least of each number of the GPUs; None if any kind is unknown.

    The one with the least memory may be the fastest, and the slowest one counts for time.
    """
    kinds = [kind_of(node) for node in nodes if node.gpus]
    known = [kind for kind in kinds if kind is not None]
    if not known or len(known) < len(kinds):
        return None
    return GpuKind(
        min(kind.memory_gb for kind in known),
        min(kind.bf16_tflops for kind in known),
        min(kind.memory_gb_per_s for kind in known),
        min(kind.link_gb_per_s for kind in known),
        (),
    )


def on_gpus(
    roles: Iterable[PlannedRole], places: Iterable[Slot]
) -> dict[tuple[int, int], list[PlannedRole]]:
    """Return (node, GPU) -> the roles of the workers on it."""
    by_name = {role.role: role for role in roles}
    by_gpu: dict[tuple[int, int], list[PlannedRole]] = {}
    for place in places:
        for gpu in place.gpus:
            by_gpu.setdefault((place.node, gpu), []).append(by_name[place.role])
    return by_gpu


def together(held: Iterable[PlannedRole], turns: bool) -> float:
    """Return the most bytes that workers on one GPU use of it at a time.

    Args:
        held: the role of each worker on the GPU.
        turns: whether generators and learners sleep in turn; a role that sleeps keeps
            `KEPT_ASLEEP`, and roles of neither side never sleep.
    """
    always, awake = 0.0, dict.fromkeys(COLOCATED_GROUPS.values(), 0.0)
    for role in held:
        if turns and role.role in COLOCATED_GROUPS:
            stays = sum(role.parts.get(part, 0) for part in KEPT_ASLEEP)
            always += stays
            awake[COLOCATED_GROUPS[role.role]] += role.peak - stays
        else:
            always += role.peak
    return always + max(awake.values())


def left_for_engine(held: Sequence[PlannedRole], kind: GpuKind, turns: bool) -> float:
    """Return the share of a GPU that each of its generators may take beside its other workers."""
    others = [role for role in held if role.role != "generator"]
    taken = sum(
        sum(role.parts.get(part, 0) for part in KEPT_ASLEEP)
        if turns and role.role in COLOCATED_GROUPS
        else role.peak
        for role in others
    )
    return (usable_bytes(kind) - taken) / (len(held) - len(others)) / (kind.memory_gb * GB)


def usable_bytes(kind: GpuKind) -> float:
    """Return the bytes of a GPU of this kind that tensors can use."""
    return USABLE * kind.memory_gb * GB


def _crowded_gpus(
    roles: Iterable[PlannedRole], places: Iterable[Slot], nodes: Sequence[Node], turns: bool
) -> list[Shortage]:
    """Return the GPUs whose workers need more than there is, one for each set of roles."""
    by_roles: dict[tuple[str, ...], Shortage] = {}
    for (node, _), held in on_gpus(roles, places).items():
        if shortage := _over(nodes[node], held, turns):
            names = sorted(role.role for role in held)
            by_roles.setdefault((*names, str(nodes[node].gpu_kind)), shortage)
    return list(by_roles.values())


def _stage_shortages(stages: Iterable[PlannedRole], nodes: Sequence[Node]) -> Iterator[Shortage]:
    """Yield supervised stages with too few GPUs or too little memory; each runs alone."""
    gpus = sum(node.gpus for node in nodes)
    kinds = [(kind.memory_gb, node) for node in nodes if node.gpus and (kind := kind_of(node))]
    _, smallest = min(kinds, key=itemgetter(0), default=(0, None))
    for role in stages:
        if role.workers > gpus:
            section = "reward" if role.role == "reward_model" else role.role
            yield Shortage(
                f"{role.role} needs {role.workers} GPUs, one for each process "
                f"({section}.train_workers), and the cluster has {gpus}",
                MISSING_GPU * (role.workers - gpus),
            )
        if smallest and (shortage := _over(smallest, [role], turns=False)):
            yield shortage


def _machine_shortages(
    ppo: Iterable[PlannedRole], stages: Iterable[PlannedRole]
) -> Iterator[Shortage]:
    """Yield what exceeds this machine's memory, without GPUs: PPO's roles, or a stage alone."""
    memory = memory_of_machine()
    needs = {"PPO's roles": sum(role.workers * role.peak for role in ppo)}
    needs |= {f"the processes of {role.role}": role.workers * role.peak for role in stages}
    for who, needed in needs.items():
        if needed > memory:
            yield Shortage(
                f"{who} need {needed / GB:,.1f} GB of this machine's {memory / GB:,.1f} GB of "
                "memory",
                needed - memory,
            )


def _cache_shortage(config: Config, engine: Engine) -> Shortage:
    """Return the shortage of a KV cache that holds no whole sequence, which vLLM refuses."""
    longest, cache = config.model.max_length, engine.parts["KV cache"]
    needed = engine.cache_bytes(1, longest)
    return Shortage(
        f"a generator has {cache / GB:,.2f} GB left for its KV cache, and one sequence of "
        f"model.max_length {longest} needs {needed / GB:,.2f} GB on each of its GPUs",
        needed - cache + engine.lacking,
    )


def unservable(config: Config, nodes: Iterable[Node]) -> Shortage | None:
    """Return why the policy cannot be sampled on these nodes' GPUs; None if it can, or not there.

    vLLM's LoRA kernels for GPUs assert half precision, which is float16 before Ampere.
    """
    kinds = [kind_of(node) for node in nodes if node.gpus]
    if not config.placement.gpus_of("generator") or not (kinds or config.cluster.joins_cluster):
        return None
    dtype, on_vllm = config.engine_dtype, config.rollout.engine == "vllm"
    lacks_bf16 = bool(kinds) and all(kind is not None and not kind.has_bf16 for kind in kinds)
    half = "float16" if lacks_bf16 else "bfloat16"
    if on_vllm and dtype == "bfloat16" and lacks_bf16:
        return Shortage(
            "vLLM has no bfloat16 on GPUs before Ampere, and rollout.dtype is bfloat16",
            MISSING_GPU,
            f"set rollout.dtype={half}",
        )
    if on_vllm and dtype == "float32" and config.serving == "adapter":
        parallel = config.generators.tensor_parallel_size > 1
        return Shortage(
            "generators serve adapters on GPUs in half precision, and rollout.dtype is float32",
            MISSING_GPU,
            f"set rollout.dtype={half}" + ("" if parallel else " or rollout.serving=merged"),
        )
    try:
        if "ppo" in config.run.stages:
            config.require_corrected_truncation(engine_is_exact=False)
    except ValueError as error:
        return Shortage(f"on GPUs, {error}", MISSING_GPU)
    return None


def _over(node: Node, held: Sequence[PlannedRole], turns: bool) -> Shortage | None:
    kind, needed = kind_of(node), together(held, turns)
    if kind is None or needed <= (usable := usable_bytes(kind)):
        return None
    largest = max(held, key=lambda role: role.peak)
    return Shortage(
        f"{', '.join(role.role for role in held)} need{'s' if len(held) == 1 else ''} "
        f"{needed / GB:,.1f} GB on one {node.gpu_kind or 'GPU'}, which has {usable / GB:,.1f} GB "
        f"for tensors: {_largest_parts(largest)}",
        needed - usable,
    )


def _largest_parts(role: PlannedRole) -> str:
    """Return the three largest parts of a role's memory as text."""
    if role.start > role.total:
        return (
            f"the {role.start / GB:,.1f} GB of {role.role}'s weights are whole while it loads, "
            "before ZeRO-3 divides them"
        )
    parts = sorted(role.parts.items(), key=lambda part: -part[1])
    listed = ", ".join(f"{name} {size / GB:,.1f}" for name, size in parts[:3])
    return f"{role.role}'s largest parts are {listed} GB"


@dataclass(frozen=True)
class Plan:
    """Needs of a run: memory, placement and time."""

    config: Config
    nodes: tuple[Node, ...]
    """The nodes that it runs on; without a GPU: this machine."""
    models: Models
    roles: tuple[PlannedRole, ...]
    """Roles of PPO, and the supervised stages, each of which has the whole cluster."""
    places: tuple[Slot, ...]
    """Where PPO's workers are; empty without GPUs, or where not all of them fit."""
    sequences: int
    """Sequences of `longest_held` that a generator's KV cache holds at a time; 0 if its GPUs are
    of unknown kind."""
    shortages: tuple[Shortage, ...]
    """Reasons why it does not fit."""
    time: TimeEstimate | None
    """Predicted times of PPO; None without it, or where GPUs' speed or the placement is unknown."""
    bytes_per_sync: int
    """Bytes of the adapter that each generator receives."""
    late_calls: str | None
    """See `late_calls`; None if no call is late, or after a rehearsal, whose calls were in time."""
    assumptions: tuple[str, ...]
    """Assumptions besides those of the times."""
    confirmed_by: str | None = None
    """What measured its seconds; None: they are predicted, and no GPU has confirmed them."""

    @property
    def fits(self) -> bool:
        """True if every process has the memory that it needs."""
        return not self.shortages

    @property
    def missing(self) -> float:
        """Bytes that are short in all; a missing GPU outweighs any number of them."""
        return sum(shortage.missing for shortage in self.shortages)

    def role(self, name: str) -> PlannedRole:
        """Return a role by its name."""
        return next(role for role in self.roles if role.role == name)


def prediction(config: Config, nodes: Sequence[Node]) -> Plan:
    """Predict what a config needs of nodes, and whether they have it.

    Raises:
        DataError: a model is neither a folder here nor described by a shape.
    """
    models = models_of(config)
    has_gpus = any(node.gpus for node in nodes)
    runs_ppo = "ppo" in config.run.stages
    places, short = _places(config, nodes) if has_gpus and runs_ppo else ([], [])
    setting = Setting(config, models, kinds_of(config, nodes, places) if has_gpus else {})
    ppo = ppo_roles(setting) if runs_ppo else []
    stages = stage_roles(config, models, has_gpus)
    if has_gpus:
        short += _crowded_gpus(ppo, places, nodes, config.placement.turns)
        short += _stage_shortages(stages, nodes)
    else:
        short += _machine_shortages(ppo, stages)
    generator = engine(setting)
    is_known = setting.kinds.get("generator") is not None or not has_gpus
    sequences = generator.sequences(longest_held(config)) if is_known else 0
    samples = bool({*SAMPLING} & {*config.run.stages})
    if samples and is_known and not sequences:
        short.append(_cache_shortage(config, generator))
    if samples and (refused := unservable(config, nodes)):
        short.append(refused)
    time = estimate_time(setting, on_gpus(ppo, places).values()) if places else None
    return Plan(
        config=config,
        nodes=tuple(nodes),
        models=models,
        roles=(*ppo, *stages),
        places=tuple(places),
        sequences=sequences,
        shortages=tuple(short),
        time=time,
        bytes_per_sync=sync_bytes(config, models.tuned.shape) if runs_ppo else 0,
        late_calls=late_calls(setting, time),
        assumptions=(*models.assumptions, *unknown_extents(config, models), *_unknown_kinds(nodes)),
    )


def _places(config: Config, nodes: Sequence[Node]) -> tuple[list[Slot], list[Shortage]]:
    demanded = demands(config)
    places = fit(demanded, nodes)
    return ([], [_unplaced(demanded, nodes)]) if places is None else (places, [])


def kinds_of(
    config: Config, nodes: Sequence[Node], places: Iterable[Slot]
) -> dict[str, GpuKind | None]:
    """Return each role's `smallest_kind`, of the whole cluster where it is not placed."""
    kinds: dict[str, GpuKind | None] = {}
    placed = list(places)
    for demand in demands(config):
        if demand.gpus:
            its = [nodes[place.node] for place in placed if place.role == demand.role] or nodes
            kinds[demand.role] = smallest_kind(its)
    return kinds


def _unknown_kinds(nodes: Iterable[Node]) -> list[str]:
    unknown = [node.name for node in nodes if node.gpus and kind_of(node) is None]
    if not unknown:
        return []
    return [f"the kind of GPUs of {', '.join(unknown)} is unknown: their memory is not checked"]


def memory_gb(role: PlannedRole) -> Mapping[str, float]:
    """Return GB by part, empty parts left out, and their ``total``."""
    parts = {name: size / GB for name, size in role.parts.items() if size}
    return {**parts, "total": role.total / GB}
