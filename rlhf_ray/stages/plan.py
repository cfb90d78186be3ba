"""The command plan in its first form: what a config resolves to, and what would run where."""

from rlhf_ray.algorithms.estimators import resolve
from rlhf_ray.config import Config, dump
from rlhf_ray.stages.run_folder import RunFolder


def describe(config: Config) -> str:
    """The resolved config and a table of the roles, as text of at most 100 columns."""
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
    rollouts = config.ppo.iterations * config.ppo.batch_size
    steps = config.ppo.epochs * config.ppo.batch_size // config.ppo.mini_batch_size
    lines = [
        dump(config).rstrip(),
        "",
        f"{'role':<12}{'workers':>8}  what",
        *(f"{role:<12}{count:>8}  {what}" for role, count, what in roles),
        "",
        f"stages: {', '.join(config.run.stages)}",
        f"folder: {RunFolder(config).path}",
        f"ppo: {config.ppo.iterations} iterations of {config.ppo.batch_size} rollouts "
        f"({rollouts} in all), {steps} optimizer steps each",
    ]
    return "\n".join(lines)


def _sources(config: Config) -> str:
    return ", ".join(source.name for source in config.rewards)
