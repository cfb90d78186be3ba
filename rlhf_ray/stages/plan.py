"""The command plan: what a config resolves to, what would run where, and how large models are."""

import dataclasses
from typing import Any

from rlhf_ray.algorithms.estimators import resolve
from rlhf_ray.config import Config, dump
from rlhf_ray.stages.planned_models import described, planned_models, planned_trainings
from rlhf_ray.stages.run_folder import RunFolder


def describe(config: Config) -> str:
    """The resolved config, and tables of the roles and the models."""
    rollouts = config.ppo.iterations * config.ppo.batch_size
    steps = config.ppo.epochs * config.ppo.batch_size // config.ppo.mini_batch_size
    lines = [
        dump(config).rstrip(),
        "",
        f"{'role':<12}{'workers':>8}  what",
        *(f"{role:<12}{count:>8}  {what}" for role, count, what in _roles(config)),
        *described(config),
        "",
        f"stages: {', '.join(config.run.stages)}",
        f"folder: {RunFolder(config).path}",
        f"ppo: {config.ppo.iterations} iterations of {config.ppo.batch_size} rollouts "
        f"({rollouts} in all), {steps} optimizer steps each",
    ]
    return "\n".join(lines)


def as_json(config: Config) -> dict[str, Any]:
    """The same, for programs; memory in bytes."""
    return {
        "config": config.model_dump(mode="json"),
        "roles": [
            {"role": role, "workers": count, "what": what} for role, count, what in _roles(config)
        ],
        "models": [dataclasses.asdict(model) for model in planned_models(config)],
        "trainings": [dataclasses.asdict(part) for part in planned_trainings(config)],
        "stages": list(config.run.stages),
        "folder": str(RunFolder(config).path),
    }


def _roles(config: Config) -> list[tuple[str, int, str]]:
    """Role, number of its workers, what they are."""
    own_reference = config.reference.kind == "own"
    parallel = config.generators.tensor_parallel_size
    spread = f", over {parallel} GPUs each" if parallel > 1 else ""
    engine = f"{config.rollout.engine}, {config.serving} serving{spread}"
    roles = [
        ("generator", config.generators.num, engine),
        ("reward", config.reward.num_workers, _sources(config)),
        (
            "reference",
            config.reference.num_processes,
            "frozen SFT model" if own_reference else "the policy's base, adapter off",
        ),
        ("policy", config.policy.num_ranks, f"DeepSpeed, ZeRO {config.policy.zero_stage}"),
    ]
    if resolve(config.ppo.advantage).needs_critic:
        roles.append(
            ("critic", config.critic.num_ranks, f"DeepSpeed, ZeRO {config.critic.zero_stage}")
        )
    if config.cluster.mode == "inline":
        roles = [
            (role, 1, "in this process") if count else (role, 0, what)
            for role, count, what in roles
        ]
    return roles


def _sources(config: Config) -> str:
    return ", ".join(source.name for source in config.rewards)
