"""A plan as text for people, and as JSON for programs."""

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from rlhf_ray.config import Config, dump
from rlhf_ray.placement.hardware import GPU_KINDS
from rlhf_ray.planning.changes import Change
from rlhf_ray.planning.layouts import Layout
from rlhf_ray.planning.memory import GB, weights_bytes
from rlhf_ray.planning.memory_check import USABLE, Shortage
from rlhf_ray.planning.prediction import Plan, memory_gb
from rlhf_ray.planning.roles import PlannedRole
from rlhf_ray.planning.throughput import ASSUMPTIONS, Pace, middle
from rlhf_ray.planning.trainings import planned_training, trained_parts
from rlhf_ray.runs.folder import RunFolder

WIDTH = 100
"""Characters of a line at most."""


def as_text(plan: Plan, changes: list[Change], layouts: list[Layout]) -> str:
    """The resolved config, then what it comes to.

    Args:
        plan: the plan.
        changes: with which it would fit, where it does not.
        layouts: of the same job, side by side.
    """
    config = plan.config
    rollouts = config.ppo.iterations * config.ppo.batch_size
    steps = config.ppo.epochs * config.ppo.batch_size // config.ppo.mini_batch_size
    lines = [
        dump(config).rstrip(),
        "",
        f"{'role':<12}{'workers':>8}  what",
        *(f"{role:<12}{count:>8}  {what}" for role, count, what in _what(config)),
        *_models(plan),
        *_trainings(plan),
        *_memory(plan),
        *_placement(plan),
        *_pace(plan),
        *_layouts(layouts),
        "",
        f"stages: {', '.join(config.run.stages)}",
        f"folder: {RunFolder(config).path}",
        f"ppo: {config.ppo.iterations} iterations of {config.ppo.batch_size} rollouts "
        f"({rollouts} in all), {steps} optimizer steps each",
        *_verdict(plan, changes),
    ]
    return "\n".join(lines)


def as_json(plan: Plan, changes: list[Change], layouts: list[Layout]) -> dict[str, Any]:
    """The same; memory in GB of 10^9 bytes where a name says so, else in bytes."""
    config, pace = plan.config, plan.pace
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
        "seconds_per_iteration": _middles(pace) if pace else None,
        "seconds_range": _ranges(pace) if pace else None,
        "bytes_per_sync": plan.bytes_per_sync,
        "days": middle(pace.days) if pace else None,
        "days_range": list(pace.days) if pace else None,
        "idle_gpu_hours": pace.idle_gpu_hours if pace else None,
        "layouts": [
            {
                "changes": layout.changes,
                "gpus": layout.gpus,
                "days": middle(layout.days),
                "idle_gpu_hours": layout.idle_gpu_hours,
            }
            for layout in layouts
        ],
        "sequences_per_generator": plan.sequences,
        "assumptions": [*plan.assumptions, *_pace_assumptions(plan)],
        "cluster": [
            dataclasses.asdict(node) | {"labels": dict(node.labels)} for node in plan.nodes
        ],
        "config": config.model_dump(mode="json"),
        "models": [
            {
                "key": model.key,
                "path": model.path,
                "parameters": model.shape.size.parameters,
                "weights_bytes": weights_bytes(model.shape.size, config.model.dtype),
            }
            for model in plan.models.distinct
        ],
        "trainings": [
            dataclasses.asdict(planned_training(config, part))
            for part in trained_parts(config, plan.models)
        ],
        "stages": list(config.run.stages),
        "folder": str(RunFolder(config).path),
    }


def _role(role: PlannedRole) -> dict[str, Any]:
    return {
        "workers": role.workers,
        "gpus_per_worker": role.gpus,
        "memory_gb": memory_gb(role),
        "start_gb": role.start / GB,
    }


def _middles(pace: Pace) -> dict[str, float]:
    return {name: middle(what) for name, what in _all(pace).items()}


def _ranges(pace: Pace) -> dict[str, list[float]]:
    return {name: list(what) for name, what in _all(pace).items()}


def _all(pace: Pace) -> dict[str, tuple[float, float]]:
    return {**pace.phases, "total": pace.iteration}


def _what(config: Config) -> list[tuple[str, int, str]]:
    """Role, number of its workers, what they are."""
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
        weights = _gb(weights_bytes(size, plan.config.model.dtype))
        where = model.path or "-"
        yield f"{model.key:<14}{size.parameters:>18,}{weights:>12}  {where}"


def _trainings(plan: Plan) -> Iterator[str]:
    trainings = [planned_training(plan.config, p) for p in trained_parts(plan.config, plan.models)]
    if trainings:
        yield ""
        yield f"{'trains':<14}{'parameters':>18}{'frozen':>12}{'state':>12}  (nothing sharded)"
    for part in trainings:
        frozen, state = _gb(part.weights_bytes), _gb(part.training_bytes)
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
"""Column -> parts of the memory that it adds up."""


def _memory(plan: Plan) -> Iterator[str]:
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
            f"{plan.config.model.max_length:,} tokens at a time"
        )


def _placement(plan: Plan) -> Iterator[str]:
    if not plan.places:
        return
    yield ""
    for index, node in enumerate(plan.nodes):
        seats: list[list[str]] = [[] for _ in range(node.gpus)]
        for place in plan.places:
            for gpu in place.gpus if place.node == index else ():
                seats[gpu].append(f"{place.role}-{place.rank}")
        kind = node.gpu_kind or "GPUs that are not known"
        yield f"{node.name}, {node.gpus} x {kind}:"
        yield from _rows([f"{gpu}: {' + '.join(held) or '-'}" for gpu, held in enumerate(seats)])


def _rows(cells: list[str]) -> Iterator[str]:
    """In columns as wide as the widest, as many as a line holds."""
    width = max(map(len, cells), default=0) + 2
    count = max(1, (WIDTH - 2) // width)
    for first in range(0, len(cells), count):
        yield "  " + "".join(f"{cell:<{width}}" for cell in cells[first : first + count]).rstrip()


def _pace(plan: Plan) -> Iterator[str]:
    pace = plan.pace
    if pace is None:
        return
    yield ""
    if pace.phases:
        yield f"{'phase':<10}{'seconds of an iteration':>25}"
        for name, (best, worst) in _all(pace).items():
            yield f"{name:<10}{f'{best:,.1f} to {worst:,.1f}':>25}"
        yield f"bytes of an adapter that is sent to each generator: {plan.bytes_per_sync:,}"
        yield f"idle GPU-hours of this layout: {pace.idle_gpu_hours:,.0f}"
    yield f"days of the run: {pace.days[0]:,.2f} to {pace.days[1]:,.2f}"
    yield "taken for granted, at best and at worst:"
    for name, (best, worst) in ASSUMPTIONS.items():
        yield f"  {name}: {best:g} to {worst:g}"


def _layouts(layouts: list[Layout]) -> Iterator[str]:
    if not layouts:
        return
    yield ""
    yield f"{'layout, as predicted':<60}{'GPUs':>6}{'days of the run':>18}{'idle GPU-hours':>16}"
    for layout in layouts:
        keys = _overrides(layout.changes) or "as configured"
        first, *rest = textwrap.wrap(keys, 60, break_long_words=False, break_on_hyphens=False)
        days = f"{layout.days[0]:,.2f} to {layout.days[1]:,.2f}"
        yield f"{first:<60}{layout.gpus:>6}{days:>18}{layout.idle_gpu_hours:>16,.0f}"
        yield from (f"  {line}" for line in rest)


def _pace_assumptions(plan: Plan) -> list[str]:
    if plan.pace is None:
        return []
    return [f"{name}: {best:g} to {worst:g}" for name, (best, worst) in ASSUMPTIONS.items()]


def _verdict(plan: Plan, changes: list[Change]) -> Iterator[str]:
    for note in plan.assumptions:
        yield _wrapped(f"note: {note}")
    kinds = {node.gpu_kind for node in plan.nodes if node.gpu_kind}
    for kind in sorted(kinds):
        memory = GPU_KINDS[kind].memory_gb
        yield f"{kind}: {memory:g} GB, of which tensors can have {USABLE * memory:,.1f}"
    yield ""
    yield "It fits." if plan.fits else "It does not fit:"
    for shortage in plan.shortages:
        yield _wrapped(f"  - {_reason(shortage, changes)}")
    if changes:
        yield "It would fit with" + (" any of these:" if len(changes) > 1 else ":")
    for change in changes:
        yield _wrapped(f"  {_overrides(change)}")


def _reason(shortage: Shortage, changes: list[Change]) -> str:
    """With what would make room, where no change of the config is named."""
    is_all = changes or not shortage.remedy
    return shortage.reason if is_all else f"{shortage.reason}. {shortage.remedy}"


def _overrides(change: Change) -> str:
    """As they are written behind a config."""
    return " ".join(f"{key}={_yaml(value)}" for key, value in change.items())


def _wrapped(line: str) -> str:
    return textwrap.fill(
        line, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / GB:,.2f} GB"
