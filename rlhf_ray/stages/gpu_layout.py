"""The layout of a run's GPUs, settled and checked before its first stage begins."""

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from transformers import PretrainedConfig

from rlhf_ray import interruption
from rlhf_ray.cluster.spawner import RoleSpawner
from rlhf_ray.config import Config
from rlhf_ray.config.stages import SAMPLING, STAGES
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.placement.hardware import kind_of
from rlhf_ray.placement.layout import Node, demands, fit, held_at_once, shortage
from rlhf_ray.planning.plan import arranged, choices, nodes_of, with_stages
from rlhf_ray.planning.prediction import prediction, unservable
from rlhf_ray.planning.roles import CACHE_KEY, UTILIZATION_KEY
from rlhf_ray.planning.shapes import models_of


def settle_layout(config: Config, stages: Collection[str], say: Callable[[str], None]) -> Config:
    """Return the config with what it leaves open of GPUs chosen; refuse what cannot start.

    Of a cluster that is joined, only what its generators share is read: capacity is waited for.

    Args:
        config: the whole config.
        stages: those that are to run.
        say: prints what was chosen, and warnings.

    Raises:
        ConfigError: a stage cannot start on this machine; nothing has begun.
    """
    if not any(STAGES[stage].needs_ray for stage in stages):
        return config
    sampling = [stage for stage in SAMPLING if stage in stages]
    joins, samples = config.cluster.joins_cluster, bool(sampling)
    sampler = "ppo" if "ppo" in stages else next(iter(sampling), "")
    is_open = not joins or (samples and config.placement.gpus_of("generator") not in (0, 1))
    nodes = nodes_of(config) if is_open else ()
    if samples and (refused := unservable(with_stages(config, stages), nodes)):
        why = "; ".join(filter(None, (refused.reason, refused.remedy)))
        raise ConfigError(f"{sampler} cannot start: {why}. No stage has begun")
    if config.cluster.mode == "inline" or not is_open:
        return config
    if not joins and not any(node.gpus for node in nodes):
        if samples:
            _refuse_engine_without_gpu(config)
        return config
    _fetch_shapes(config)
    # A single stage may run that run.stages does not name.
    settled = arranged(with_stages(config, stages), nodes).model_copy(update={"run": config.run})
    settled = _with_known_sizes(config, settled)
    if samples:
        _refuse_unknown_memory(settled, nodes)
    for what, asked in {} if joins else held_at_once(settled, stages).items():
        if fit(asked, nodes) is None:
            raise ConfigError(f"{what} cannot start: {shortage(asked, nodes)}. No stage has begun")
    with suppress(DataError):  # a model's size is not known
        plan = prediction(with_stages(settled, stages), nodes)
        if plan.shortages and not plan.sequences and samples:
            reason = plan.shortages[-1].reason
            raise ConfigError(f"{sampler} cannot start: {reason}. No stage has begun")
        for short in plan.shortages:
            say(f"Warning: by the plan, {short.reason} (rlhf-ray plan shows what would fit)")
    if chosen := choices(config, settled):
        say(f"Roles share GPUs, so these are chosen: {chosen}")
    return settled


def require_capacity(config: Config, stages: Collection[str]) -> None:
    """Wait until the cluster has the GPUs of every stage, whoever uses them now.

    Raises:
        PlacementError: it does not get them within ``placement.timeout_s``.
    """
    for asked in held_at_once(config, stages).values():
        interruption.run(RoleSpawner(config, lambda *_: None).await_capacity(asked))


def _refuse_engine_without_gpu(config: Config) -> None:
    """Refuse vLLM's build for GPUs where generators run on CPUs."""
    builds = [*metadata.distributions(name="vllm")]
    if config.rollout.engine == "vllm" and builds and "+cpu" not in builds[0].version:
        raise ConfigError(
            f"vLLM {builds[0].version} is a build for GPUs, and generators get none here "
            f"(placement.gpus={config.placement.gpus}); set rollout.engine=transformers, or "
            "install the packages for CPUs: RLHF_RAY_LOCK=cpu scripts/setup.sh"
        )


def _refuse_unknown_memory(config: Config, nodes: Sequence[Node]) -> None:
    """Refuse vLLM's default of nearly a whole GPU where generators share theirs."""
    unknown = [node.name for node in nodes if node.gpus and kind_of(node) is None]
    is_set = {UTILIZATION_KEY, CACHE_KEY} & {*config.rollout.engine_args}
    has_parts = config.placement.gpus_of("generator") not in (0, 1)
    if config.rollout.engine != "vllm" or not has_parts or is_set:
        return
    if unknown or not any(node.gpus for node in nodes):
        raise ConfigError(
            "Generators share their GPUs, and the memory of those is not known yet "
            f"({', '.join(unknown) or 'no node has GPUs'}): set rollout.engine_args.{CACHE_KEY}, "
            f"the bytes of each generator's KV cache, and {UTILIZATION_KEY}, the share of a GPU "
            "for its weights and cache"
        )


def _with_known_sizes(config: Config, settled: Config) -> Config:
    """Return the settled config; an engine's memory is not chosen by the size of another model."""
    if settled.rollout == config.rollout:
        return settled
    models = models_of(with_stages(config, ["ppo"]))
    of_roles = {"reward": models.reward, "critic": models.critic}
    used = [of_roles.get(demand.role, models.tuned) for demand in demands(config) if demand.gpus]
    assumed = {model.assumed_for for model in used if model.assumed_for}
    if assumed and UTILIZATION_KEY in config.rollout.engine_args:
        return settled.model_copy(update={"rollout": config.rollout})
    if assumed:
        raise ConfigError(
            f"Generators share their GPUs, and the size of {', '.join(sorted(assumed))} is not "
            f"known here: set rollout.engine_args.{UTILIZATION_KEY}, the share of a GPU for each "
            "generator's weights and cache"
        )
    return settled


def _fetch_shapes(config: Config) -> None:
    """Bring the config.json of models on the hub here, from which their sizes are known."""
    for path in (config.model.path, config.sft.path, config.reward.path, config.critic.path):
        if path is not None and not Path(path).is_dir():
            with suppress(OSError):
                PretrainedConfig.get_config_dict(path)
