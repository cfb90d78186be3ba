"""The command plan: what a config needs of a cluster, and whether it fits."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

from rlhf_ray.config import Config
from rlhf_ray.config.stages import SAMPLING
from rlhf_ray.errors import DataError, PlacementError
from rlhf_ray.placement.hardware import kind_of, live_cluster, parse_cluster, this_machine
from rlhf_ray.placement.layout import PARTS, Node, demands, fit
from rlhf_ray.planning.layout_options import Change
from rlhf_ray.planning.memory import GB
from rlhf_ray.planning.prediction import Plan, left_for_engine, on_gpus, prediction
from rlhf_ray.planning.rehearsal import calibrated, load
from rlhf_ray.planning.roles import CACHE_KEY, UTILIZATION, UTILIZATION_KEY, engine_of
from rlhf_ray.planning.suggestions import Layout, best_layouts, fitting_changes

LIVE = "live"
"""Value of --cluster for the running Ray cluster."""


def plan_for(
    config: Config, cluster: str | None, kept: Collection[str] | None = None
) -> tuple[Plan, list[Change], list[Layout] | None]:
    """Return the plan, the changes that would make it fit, and the best layouts if asked for.

    Args:
        config: the whole config.
        cluster: as `parse_cluster` reads it, or ``live``; None: the Ray cluster that the run
            joins, else this machine.
        kept: keys that the best layouts leave as they are; None: layouts are not searched.

    Raises:
        ConfigError: ``cluster`` is malformed.
        PlacementError: ``cluster`` is ``live``, and no cluster can be reached.
        DataError: a model is neither a folder here nor described by a shape.
    """
    nodes, note = _nodes(config, cluster)
    settled = arranged(config, nodes)
    chosen = choices(config, settled)
    plan = prediction(settled, nodes)
    shared = (f"roles share GPUs, so these are chosen: {chosen}",) if chosen and plan.fits else ()
    # From the prediction, before calibration: other configs have not been rehearsed.
    changes = [] if plan.fits else fitting_changes(plan)
    layouts = None if kept is None else _best_layouts(config, settled, nodes, kept)
    # A rehearsal says nothing about a cluster that is only named.
    rehearsal = load(config, nodes) if cluster in (None, LIVE) else None
    if rehearsal is not None:
        plan = calibrated(plan, rehearsal)
        note = (*note, f"seconds are from {plan.confirmed_by}")
    late = (plan.late_calls,) if plan.late_calls else ()
    noted = dataclasses.replace(plan, assumptions=(*note, *late, *plan.assumptions, *shared))
    return noted, changes, layouts


def _best_layouts(
    config: Config, settled: Config, nodes: Sequence[Node], kept: Collection[str]
) -> list[Layout]:
    """Return the best layouts of a config, as changes of what it was before it was settled.

    The share of an engine is searched, which its cache in bytes follows: so that stays out.
    """
    args = dict(settled.rollout.engine_args)
    if CACHE_KEY not in config.rollout.engine_args:
        args.pop(CACHE_KEY, None)
    start = _with_engine_args(settled, args)
    chosen: dict[str, object] = {}
    if start.placement.gpus != config.placement.gpus:
        chosen["placement.gpus"] = start.placement.gpus
    if args.get(UTILIZATION_KEY) != config.rollout.engine_args.get(UTILIZATION_KEY):
        chosen[f"rollout.engine_args.{UTILIZATION_KEY}"] = args[UTILIZATION_KEY]
    return best_layouts(prediction(start, nodes), kept, chosen)


def arranged(config: Config, nodes: Sequence[Node]) -> Config:
    """Choose what the config leaves open where roles share GPUs: their parts, and vLLM's memory.

    Parts (placement.gpus) on a machine of its own with fewer GPUs than workers: the largest that
    fit. A vLLM engine that shares its GPU gets its KV cache in bytes: otherwise it would measure
    what is free, while others load, and take what they allocate for its own. What is set stays.

    Raises:
        DataError: an engine shares its GPU, and the size of a model is not known.
    """
    if (
        not {*SAMPLING} & {*config.run.stages}
        or config.cluster.mode == "inline"
        or not any(node.gpus for node in nodes)
    ):
        return config
    options = [_with_engine_memory(option, nodes) for option in _in_parts(config, nodes)]
    if len(options) > 1:
        with suppress(DataError):  # without the sizes of models, the largest part
            return next(
                (option for option in options if prediction(option, nodes).fits), options[0]
            )
    return options[0]


def _in_parts(config: Config, nodes: Sequence[Node]) -> list[Config]:
    """Return the config with each part of a GPU with which its workers fit, the largest first."""
    is_open = config.placement.gpus is None and not config.cluster.joins_cluster
    if not is_open or len(nodes) > 1 or fit(demands(config), nodes):
        return [config]
    further: dict[str, object] = {}
    if config.generators.tensor_parallel_size > 1:  # it has whole ones
        generator = config.placement.generator.model_copy(update={"gpus": 1.0})
        further["generator"] = generator
    options = [
        config.model_copy(
            update={"placement": config.placement.model_copy(update={"gpus": part, **further})}
        )
        for part in PARTS
    ]
    return [option for option in options if fit(demands(option), nodes)] or [config]


def _with_engine_memory(config: Config, nodes: Sequence[Node]) -> Config:
    """Return the config with the memory of a vLLM engine that shares its GPU."""
    args = dict(config.rollout.engine_args)
    has_parts = config.placement.gpus_of("generator") not in (0, 1)
    if config.rollout.engine != "vllm" or not has_parts or {UTILIZATION_KEY, CACHE_KEY} <= {*args}:
        return config
    try:
        plan = prediction(with_stages(config, ["ppo"]), nodes)
    except DataError:
        if UTILIZATION_KEY in args:  # enough for vLLM to start, which measures the rest
            return config
        raise
    shared = [
        (kind_of(nodes[node]), held)
        for (node, _), held in on_gpus(plan.roles, plan.places).items()
        if len(held) > 1 and any(role.role == "generator" for role in held)
    ]
    known = [(kind, held) for kind, held in shared if kind is not None]
    if not shared or len(known) < len(shared):
        return config
    smallest = min((kind for kind, _ in known), key=lambda kind: kind.memory_gb)
    shape = plan.models.tuned.shape
    if CACHE_KEY not in args:
        left = min(left_for_engine(held, kind, config.placement.turns) for kind, held in known)
        most = {UTILIZATION_KEY: max(1e-3, min(left, UTILIZATION))} | args
        largest = engine_of(_with_engine_args(config, most), shape, smallest)
        cache, longest = largest.parts["KV cache"], config.model.max_length
        if not largest.sequences(longest):
            return _with_engine_args(config, most)  # 0 bytes would be as if not set
        if UTILIZATION_KEY not in args:
            # No more than can be in flight: what the others need is an estimate.
            rollouts = config.generators.max_in_flight * config.rollout.shard_size
            cache = min(cache, largest.cache_bytes(rollouts, longest))
        args[CACHE_KEY] = int(cache)
    needed = sum(engine_of(_with_engine_args(config, args), shape, smallest).parts.values())
    # vLLM ends its start where less than this share is free, also with a cache in bytes.
    share = math.ceil(1000 * needed / (smallest.memory_gb * GB)) / 1000
    return _with_engine_args(config, {UTILIZATION_KEY: share, **args})


def _with_engine_args(config: Config, args: Mapping[str, object]) -> Config:
    rollout = config.rollout.model_copy(update={"engine_args": dict(args)})
    return config.model_copy(update={"rollout": rollout})


def with_stages(config: Config, stages: Collection[str]) -> Config:
    """Return the config of a run of these stages alone."""
    run = config.run.model_copy(update={"stages": [*stages]})
    return config.model_copy(update={"run": run})


def choices(config: Config, settled: Config) -> str:
    """Return the keys that `arranged` has chosen, as overrides; empty where it chose none."""
    given, found = config.rollout.engine_args, dict[str, object]()
    if settled.placement.gpus != config.placement.gpus:
        found["placement.gpus"] = settled.placement.gpus
    for key, value in settled.rollout.engine_args.items():
        if key not in given:
            found[f"rollout.engine_args.{key}"] = value
    return " ".join(f"{key}={value}" for key, value in found.items())


def prediction_for(config: Config) -> Plan:
    """Return the predicted plan, without measurements from a rehearsal."""
    nodes = nodes_of(config)
    return prediction(arranged(config, nodes), nodes)


def nodes_of(config: Config) -> tuple[Node, ...]:
    """Return the nodes that the run would use if started here."""
    return _nodes(config, None)[0]


def _nodes(config: Config, cluster: str | None) -> tuple[tuple[Node, ...], tuple[str, ...]]:
    if cluster is not None and cluster != LIVE:
        return parse_cluster(cluster), ()
    if cluster is None and not config.cluster.joins_cluster:
        return (this_machine(),), ()
    try:
        return live_cluster(), ()
    except PlacementError as error:
        if cluster == LIVE:
            raise
        return (this_machine(),), (f"compared with this machine. {error}",)
