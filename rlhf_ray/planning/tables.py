"""Format a plan as text, or as JSON for programs."""

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf_ray.config import Config
from rlhf_ray.placement.hardware import GPU_KINDS
from rlhf_ray.placement.layout import held_at_once
from rlhf_ray.planning.layout_options import Change, changed
from rlhf_ray.planning.memory import GB, gb, weights_bytes
from rlhf_ray.planning.prediction import USABLE, Plan, Shortage, memory_gb, prediction
from rlhf_ray.planning.roles import CACHE_KEY, PlannedRole, longest_held, state_bytes
from rlhf_ray.planning.stages.estimates import StageEstimate, stage_estimates, whole_run
from rlhf_ray.planning.stages.table import as_values, assumed, stage_table, total_time
from rlhf_ray.planning.suggestions import Layout, layout_table, overrides
from rlhf_ray.planning.throughput import SECONDS_PER_DAY, TimeEstimate, middle, save_seconds
from rlhf_ray.planning.trainings import planned_training, trained_parts

WIDTH = 100
"""Longest line, characters."""


def as_text(plan: Plan, changes: list[Change], layouts: list[Layout] | None = None) -> str:
    """Return the plan as text, its answer first; no layouts: they were not searched."""
    stages = stage_estimates(plan)
    lines = [
        *_verdict(plan, changes),
        *_days(plan, stages),
        *_run(plan.config),
        *stage_table(stages, WIDTH),
        *([] if layouts is None else layout_table(layouts, WIDTH)),
        *_roles(plan.config),
        *_models(plan),
        *_trainings(plan),
        *_memory(plan),
        *_placement(plan),
        *_order(plan),
        *_time(plan),
        *_assumptions(assumed(stages)),
        *_notes(plan),
    ]
    return "\n".join(lines).rstrip()


def as_json(
    plan: Plan, changes: list[Change], layouts: list[Layout] | None = None
) -> dict[str, object]:
    """Return the plan as JSON values; names that end in ``_gb`` are in 10^9 bytes."""
    config, time, stages = plan.config, plan.time, plan.config.run.stages
    estimates = stage_estimates(plan)
    total = whole_run(estimates)
    days = total.seconds and [each / SECONDS_PER_DAY for each in total.seconds]
    return {
        "fits": plan.fits,
        "reasons": [_reason(shortage, changes) for shortage in plan.shortages],
        "changes": changes,
        "roles": {role.role: _role(role) for role in plan.roles},
        "placement": [
            {"role": p.role, "rank": p.rank, "node": plan.nodes[p.node].name, "gpu": gpu}
            for p in plan.places
            for gpu in p.gpus
        ],
        "order": _held(config),
        "seconds_per_iteration": time and {name: middle(ends) for name, ends in _all(time).items()},
        "seconds_range": time and {name: list(ends) for name, ends in _all(time).items()},
        "bytes_per_sync": plan.bytes_per_sync,
        "bytes_per_commit": round(state_bytes(config, plan.models)) if "ppo" in stages else 0,
        "seconds_per_commit": list(save_seconds(config, plan.models)) if "ppo" in stages else None,
        "days": days and sum(days) / 2,
        "days_range": days,
        "stage_estimates": [as_values(each) for each in estimates],
        "whole_run": as_values(total),
        "idle_gpu_hours": time.idle_gpu_hours if time else None,
        "confirmed_by": plan.confirmed_by,
        "layouts": [_layout(layout) for layout in layouts or ()],
        "sequences_per_generator": plan.sequences,
        "assumptions": [*plan.assumptions, *assumed(estimates)],
        "cluster": [
            dataclasses.asdict(node) | {"labels": dict(node.labels)} for node in plan.nodes
        ],
        "config": config.model_dump(mode="json"),
        "models": _model_values(plan),
        "trainings": [
            dataclasses.asdict(planned_training(config, part))
            for part in trained_parts(config, plan.models)
        ],
        "stages": list(stages),
        "folder": str(Path(config.run.dir).absolute()),
    }


def _model_values(plan: Plan) -> list[dict[str, object]]:
    return [
        {
            "key": model.key,
            "path": model.path,
            "parameters": model.shape.size.parameters,
            "weights_bytes": weights_bytes(model.shape.size, plan.config.model.dtype),
        }
        for model in plan.models.distinct
    ]


def _held(config: Config) -> list[dict[str, object]]:
    """Return what holds GPUs at once, in order."""
    return [
        {"stage": what, "workers": {role.role: role.workers for role in asked}}
        for what, asked in held_at_once(config, config.run.stages).items()
    ]


def _role(role: PlannedRole) -> dict[str, object]:
    return {
        "workers": role.workers,
        "gpus_per_worker": role.gpus,
        "memory_gb": memory_gb(role),
        "start_gb": role.start / GB,
    }


def _layout(layout: Layout) -> dict[str, object]:
    return {
        "changes": layout.changes,
        "overrides": overrides(layout.changes),
        "learns_the_same": layout.learns_the_same,
        "days": middle(layout.days),
        "days_range": list(layout.days),
        "gpu_hours": layout.gpu_hours,
        "idle_gpu_hours": layout.idle_gpu_hours,
        "gpus": layout.gpus,
        "free_gpus": layout.free,
        "fullest_gpu_gb": layout.fullest / GB,
    }


def _all(time: TimeEstimate) -> dict[str, tuple[float, float]]:
    return {**time.phases, "total": time.iteration}


def _roles(config: Config) -> Iterator[str]:
    """Yield the roles that the run has: none of PPO's in a run of supervised stages alone."""
    needed = {"rank": ["generator"], "evaluate": ["generator", "reward"]}
    roles = {role for stage in config.run.stages for role in needed.get(stage, [])}
    rows = [row for row in _what(config) if row[0] in roles or "ppo" in config.run.stages]
    if rows:
        yield ""
        yield f"{'role':<12}{'workers':>8}  what"
    for role, count, what in rows:
        yield f"{role:<12}{count:>8}  {what}"


def _run(config: Config) -> Iterator[str]:
    ppo = config.ppo
    yield f"stages: {', '.join(config.run.stages)}"
    yield f"folder: {Path(config.run.dir).absolute()}"
    if "ppo" in config.run.stages:
        yield (
            f"ppo: {ppo.iterations} iterations of {ppo.batch_size} rollouts "
            f"({ppo.iterations * ppo.batch_size} in all), "
            f"{ppo.epochs * ppo.batch_size // ppo.mini_batch_size} optimizer steps each"
        )


def _what(config: Config) -> list[tuple[str, int, str]]:
    """Return each role of PPO, its number of workers, and what they run."""
    own_reference = config.reference.kind == "own"
    parallel = config.generators.tensor_parallel_size
    spread = f", over {parallel} GPUs each" if parallel > 1 else ""
    engine = f"{config.rollout.engine}, {config.serving} serving{spread}"
    roles = [
        ("generator", config.generators.num, engine),
        ("reward", config.reward.num_workers, ", ".join(source.name for source in config.rewards)),
        (
            "reference",
            config.reference.num_processes,
            "frozen SFT model" if own_reference else "the policy's base, adapter off",
        ),
        ("policy", config.policy.num_ranks, f"DeepSpeed, ZeRO {config.policy.zero_stage}"),
    ]
    if config.may_have_critic:
        roles.append(
            ("critic", config.critic.num_ranks, f"DeepSpeed, ZeRO {config.critic.zero_stage}")
        )
    if config.cluster.mode == "inline":
        roles = [
            (role, 1, "in this process") if count else (role, 0, what)
            for role, count, what in roles
        ]
    return roles


def _models(plan: Plan) -> Iterator[str]:
    yield ""
    yield f"{'model':<14}{'parameters':>18}{'weights':>12}  folder"
    for model in plan.models.distinct:
        size = model.shape.size
        weights = gb(weights_bytes(size, plan.config.model.dtype))
        where = model.path or "-"
        yield f"{model.key:<14}{size.parameters:>18,}{weights:>12}  {where}"


def _trainings(plan: Plan) -> Iterator[str]:
    trainings = [planned_training(plan.config, p) for p in trained_parts(plan.config, plan.models)]
    if trainings:
        yield ""
        yield f"{'trains':<14}{'parameters':>18}{'frozen':>12}{'state':>12}  (nothing sharded)"
    for part in trainings:
        frozen, state = gb(part.weights_bytes), gb(part.training_bytes)
        yield f"{part.stage:<14}{part.trainable:>18,}{frozen:>12}{state:>12}"


_COLUMNS = {
    "weights": ("weights", "autocast weights", "gathered"),
    "LoRA": ("adapter",),
    "grads": ("gradients", "reduce buffer"),
    "optim": ("optimizer",),
    "activ": ("activations",),
    "logits": ("logits",),
    "KV": ("KV cache",),
    "other": ("libraries", "rollouts", "commits"),
}
"""Column -> parts of the memory that it sums."""


def _memory(plan: Plan) -> Iterator[str]:
    if not plan.roles:
        return
    unit = "GPU" if any(node.gpus for node in plan.nodes) else "process"
    columns = "".join(f"{name:>8}" for name in _COLUMNS)
    yield ""
    yield f"{f'GB a {unit}':<13}{'workers':>8}{columns}{'total':>9}"
    for role in plan.roles:
        cells = [sum(role.parts.get(p, 0) for p in parts) for parts in _COLUMNS.values()]
        listed = "".join(f"{cell / GB:>8,.2f}" if cell else f"{'-':>8}" for cell in cells)
        workers = f"{role.workers} x {role.gpus:g}" if role.gpus else str(role.workers)
        yield f"{role.role:<13}{workers:>8}{listed}{role.total / GB:>9,.2f}"
        if role.start > role.total:
            yield f"{'':<13}{'':>8}  {role.start / GB:,.2f} GB while it loads"
    if plan.sequences and "ppo" in plan.config.run.stages:
        yield (
            f"a generator's KV cache holds {plan.sequences:,} sequences of "
            f"{longest_held(plan.config):,} tokens at a time"
        )


def _placement(plan: Plan) -> Iterator[str]:
    if not plan.places:
        return
    yield ""
    for index, node in enumerate(plan.nodes):
        slots: list[list[str]] = [[] for _ in range(node.gpus)]
        for place in plan.places:
            for gpu in place.gpus if place.node == index else ():
                slots[gpu].append(f"{place.role}-{place.rank}")
        kind = node.gpu_kind or "GPUs of unknown kind"
        yield f"{node.name}, {node.gpus} x {kind}:"
        yield from _rows([f"{gpu}: {' + '.join(held) or '-'}" for gpu, held in enumerate(slots)])


def _order(plan: Plan) -> Iterator[str]:
    """Yield what is loaded when: a line holds GPUs at once, and frees them before the next."""
    held = held_at_once(plan.config, plan.config.run.stages)
    if not held or not any(node.gpus for node in plan.nodes):
        return
    yield ""
    yield "loaded in this order, each line at once, workers x GPUs:"
    for what, asked in held.items():
        listed = ", ".join(f"{role.role} {role.workers} x {role.gpus:g}" for role in asked)
        yield f"  {what:<12}{listed}"
    if cache := plan.config.rollout.engine_args.get(CACHE_KEY):
        yield _wrapped(
            f"  a generator reserves {gb(cache)} of KV cache and measures no free memory, so roles "
            "on its GPU may load before, beside or after it"
        )


def _rows(cells: list[str]) -> Iterator[str]:
    """Yield lines of equally wide columns, as many as a line holds."""
    width = max(map(len, cells), default=0) + 2
    count = max(1, (WIDTH - 2) // width)
    for first in range(0, len(cells), count):
        yield "  " + "".join(f"{cell:<{width}}" for cell in cells[first : first + count]).rstrip()


def _time(plan: Plan) -> Iterator[str]:
    config, time = plan.config, plan.time
    if time is None:
        return
    yield ""
    yield f"{'phase':<10}{'seconds of an iteration':>25}"
    for name, (best, worst) in _all(time).items():
        yield f"{name:<10}{f'{best:,.1f} to {worst:,.1f}':>25}"
    yield f"bytes of the adapter sent to each generator: {plan.bytes_per_sync:,}"
    size, seconds = state_bytes(config, plan.models), save_seconds(config, plan.models)
    took = f"{seconds[0]:,.2g} to {seconds[1]:,.2g} s"
    yield f"bytes of a commit: {size:,.0f}, written beside the next iteration in {took}"
    yield f"idle GPU-hours of this layout: {time.idle_gpu_hours:,.0f}"


def _days(plan: Plan, stages: Sequence[StageEstimate]) -> Iterator[str]:
    yield total_time(stages)
    if plan.confirmed_by is None and any(stage.seconds and stage.on_gpu for stage in stages):
        measured = ": rlhf-ray rehearse measures it on the cluster" if plan.time else ""
        yield f"predicted, and confirmed by no GPU{measured}"


def _assumptions(listed: Sequence[str]) -> Iterator[str]:
    if listed:
        yield from ("", "assumptions, at best and at worst:")
        yield from (f"  {assumption}" for assumption in listed)


def _notes(plan: Plan) -> Iterator[str]:
    yield ""
    for note in plan.assumptions:
        yield _wrapped(f"note: {note}")
    for kind in sorted({node.gpu_kind for node in plan.nodes if node.gpu_kind}):
        memory = GPU_KINDS[kind].memory_gb
        yield f"{kind}: {memory:g} GB, of which tensors can use {USABLE * memory:,.1f}"


def _verdict(plan: Plan, changes: list[Change]) -> Iterator[str]:
    yield "It fits." if plan.fits else "It does not fit:"
    for shortage in plan.shortages:
        yield _wrapped(f"  - {_reason(shortage, changes)}")
    if changes:
        yield "It would fit with" + (" any of these:" if len(changes) > 1 else ":")
    for change in changes:
        yield _wrapped(f"  {' '.join(overrides(change))}{_needs(plan, change)}")


def _needs(plan: Plan, change: Change) -> str:
    """Return the memory of the roles that a change gives more or less of it."""
    peaks = {(role.role, role.peak) for role in plan.roles}
    roles = prediction(changed(plan.config, change), plan.nodes).roles
    return "".join(f"; {r.role} {gb(r.peak)}" for r in roles if (r.role, r.peak) not in peaks)


def _reason(shortage: Shortage, changes: list[Change]) -> str:
    """Return the reason, with what would help where no change of the config is suggested."""
    is_enough = changes or not shortage.remedy
    return shortage.reason if is_enough else f"{shortage.reason}. {shortage.remedy}"


def _wrapped(line: str) -> str:
    return textwrap.fill(
        line, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
