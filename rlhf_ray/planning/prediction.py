"""What a run would take of a cluster: memory, places, time."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rlhf_ray.config import Config
from rlhf_ray.placement.hardware import GpuKind
from rlhf_ray.placement.layout import Node, Slot, demands, fit
from rlhf_ray.planning.deadlines import late_calls
from rlhf_ray.planning.memory import GB
from rlhf_ray.planning.memory_check import (
    Shortage,
    beyond_machine,
    no_cache,
    no_room,
    on_gpus,
    smallest_kind,
    stages_too_large,
    too_large,
)
from rlhf_ray.planning.roles import PlannedRole, Setting, engine, ppo_roles
from rlhf_ray.planning.shapes import Models, models_of
from rlhf_ray.planning.throughput import Pace, pace, sync_bytes
from rlhf_ray.planning.trainings import stage_roles, unknown_extents


@dataclass(frozen=True)
class Plan:
    """What a run would take."""

    config: Config
    nodes: tuple[Node, ...]
    """Where it would run; without a GPU: this machine."""
    models: Models
    roles: tuple[PlannedRole, ...]
    """Of PPO, and of the supervised stages, each of which has the cluster for itself."""
    places: tuple[Slot, ...]
    """Of PPO's workers; empty where there is no GPU, or no room."""
    sequences: int
    """Of model.max_length, that one generator's KV cache holds at a time; of GPUs of which nothing
    is known, 0."""
    shortages: tuple[Shortage, ...]
    """Why it does not fit."""
    pace: Pace | None
    """None where it is not known how fast GPUs are, or where roles would be."""
    bytes_per_sync: int
    """Of the adapter that each generator is sent."""
    late_calls: str | None
    """See `deadlines`; None where there are none, or where a rehearsal has shown it."""
    assumptions: tuple[str, ...]
    """What was taken for granted, besides the pace's."""

    @property
    def fits(self) -> bool:
        """Whether every process has the memory that it needs."""
        return not self.shortages

    @property
    def missing(self) -> float:
        """Bytes that are short in all; another GPU counts more than any number of them."""
        return sum(shortage.missing for shortage in self.shortages)

    def role(self, name: str) -> PlannedRole:
        """A role by its name."""
        return next(role for role in self.roles if role.role == name)


def prediction(config: Config, nodes: Sequence[Node]) -> Plan:
    """What a config would take of some nodes, and whether they have it.

    Args:
        config: the whole config.
        nodes: the cluster; none with a GPU: this machine's memory is what there is.

    Raises:
        DataError: a model is neither here nor described.
    """
    models = models_of(config)
    has_gpus = any(node.gpus for node in nodes)
    runs_ppo = "ppo" in config.run.stages
    places, short = _places(config, nodes) if has_gpus and runs_ppo else ([], [])
    setting = Setting(config, models, _kinds(config, nodes, places) if has_gpus else {})
    ppo = ppo_roles(setting) if runs_ppo else []
    stages = stage_roles(config, models, has_gpus)
    if has_gpus:
        short += too_large(ppo, places, nodes, config.placement.turns)
        short += stages_too_large(stages, nodes)
    else:
        short += beyond_machine(ppo, stages)
    generator = engine(setting)
    is_known = setting.kinds.get("generator") is not None or not has_gpus
    sequences = generator.sequences(config.model.max_length) if is_known else 0
    if runs_ppo and is_known and not sequences:
        short.append(no_cache(config, generator))
    is_placed = has_gpus and (bool(places) or not runs_ppo)
    predicted = pace(setting, on_gpus(ppo, places).values()) if is_placed else None
    return Plan(
        config=config,
        nodes=tuple(nodes),
        models=models,
        roles=(*ppo, *stages),
        places=tuple(places),
        sequences=sequences,
        shortages=tuple(short),
        pace=predicted,
        bytes_per_sync=sync_bytes(config, models.tuned.shape) if runs_ppo else 0,
        late_calls=late_calls(setting, predicted),
        assumptions=(
            *models.assumptions,
            *unknown_extents(config, models),
            *_unknown_kinds(nodes),
        ),
    )


def _places(config: Config, nodes: Sequence[Node]) -> tuple[list[Slot], list[Shortage]]:
    asked = demands(config)
    places = fit(asked, nodes)
    return ([], [no_room(asked, nodes)]) if places is None else (places, [])


def _kinds(
    config: Config, nodes: Sequence[Node], places: Iterable[Slot]
) -> dict[str, GpuKind | None]:
    """The smallest GPUs that each role is on; of the cluster where it has no place."""
    kinds: dict[str, GpuKind | None] = {}
    placed = list(places)
    for demand in demands(config):
        if demand.gpus:
            its = [nodes[place.node] for place in placed if place.role == demand.role] or nodes
            kinds[demand.role] = smallest_kind(its)
    return kinds


def _unknown_kinds(nodes: Iterable[Node]) -> list[str]:
    unknown = [node.name for node in nodes if node.gpus and node.gpu_kind is None]
    if not unknown:
        return []
    return [f"what GPUs {', '.join(unknown)} has is not known: their memory was not compared"]


def memory_gb(role: PlannedRole) -> Mapping[str, float]:
    """GB by part, those of nothing left out, and their ``total``."""
    parts = {name: size / GB for name, size in role.parts.items() if size}
    return {**parts, "total": role.total / GB}
