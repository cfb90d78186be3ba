"""What each stage of a run takes, and what all of them take together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rlhf_ray.placement.hardware import GpuKind
from rlhf_ray.placement.layout import fit, held_at_once
from rlhf_ray.planning.prediction import Plan, kinds_of, on_gpus, smallest_kind, together
from rlhf_ray.planning.role_times import Range, as_range
from rlhf_ray.planning.roles import PlannedRole, Setting, planned_role
from rlhf_ray.planning.stages import disk as disks
from rlhf_ray.planning.stages import hours, preparing
from rlhf_ray.planning.stages.disk import Disk
from rlhf_ray.planning.trainings import Trained, tokens_per_step, trained_parts

TOKENS = 1e8
"""Tokens whose hours are named where a stage's rows are not known."""


@dataclass(frozen=True)
class StageEstimate:
    """What one stage takes, or the whole run."""

    stage: str
    seconds: Range | None
    """None: not estimated."""
    memory: float | None
    """The most bytes on one of its GPUs, or of a process where it has none; None: not estimated."""
    on_gpu: bool
    disk: Disk | None
    """None: not estimated."""
    note: str = ""
    """Why something is not estimated, or what the estimate is of."""
    assumptions: tuple[str, ...] = ()
    """Names of the assumptions that it depends on."""
    recorded: str = ""
    """What its recorded samples take of the disk, at most; empty: it records none."""


def stage_estimates(plan: Plan) -> list[StageEstimate]:
    """Return what each of the run's stages takes, in order."""
    config = plan.config
    parts = {part.stage: part for part in trained_parts(config, plan.models)}
    found = []
    for stage in config.run.stages:
        if stage in parts:
            found.append(_training(plan, parts[stage]))
        elif config.external_model(stage) is not None:
            nothing = Disk((0, 0), (0, 0))
            found.append(
                StageEstimate(stage, (0, 0), 0, False, nothing, f"skipped: {stage}.path is set")
            )
        else:
            found.append(_OTHERS[stage](plan))
    return found


def whole_run(stages: Sequence[StageEstimate]) -> StageEstimate:
    """Return what the estimated stages take together: hours in turn, memory of the largest."""
    known = [stage.seconds for stage in stages if stage.seconds is not None]
    memories = [stage for stage in stages if stage.memory is not None]
    largest = max(memories, key=lambda stage: (stage.on_gpu, stage.memory), default=None)
    kept, peak = (0.0, 0.0), (0.0, 0.0)
    written = [stage.disk for stage in stages if stage.disk is not None]
    for disk in written:
        peak = as_range(max(peak[end], kept[end] + disk.peak[end]) for end in (0, 1))
        kept = as_range(kept[end] + disk.kept[end] for end in (0, 1))
    return StageEstimate(
        "whole run",
        as_range(sum(each[end] for each in known) for end in (0, 1)) if known else None,
        largest and largest.memory,
        largest is not None and largest.on_gpu,
        Disk(kept, peak) if written else None,
    )


def _prepare(plan: Plan) -> StageEstimate:
    config, num_gpus = plan.config, sum(node.gpus for node in plan.nodes)
    size = preparing.xml_bytes(config)
    if size is None:
        note = (
            f"prepare.posts {', '.join(config.prepare.dumps)} is not here; set prepare.posts_gb to "
            "the GB of its XML (Stack Overflow: 100)"
        )
        return StageEstimate("prepare", None, None, False, None, note)
    return StageEstimate(
        "prepare",
        preparing.prepare_seconds(config, size, num_gpus),
        preparing.prepare_memory(size),
        False,
        preparing.prepare_disk(config, size),
        preparing.work_of(config, size, num_gpus),
        assumptions=preparing.ASSUMED,
    )


def _training(plan: Plan, part: Trained) -> StageEstimate:
    config, kind = plan.config, smallest_kind(plan.nodes)
    steps = hours.num_steps(config, part)
    seconds, note = None, ""
    if steps is None:
        note = _unread(plan, part, kind)
    elif kind is None or not kind.bf16_tflops:
        note = _speed_unknown(plan)
    else:
        seconds = hours.training_seconds(config, part, kind, steps)
    return StageEstimate(
        part.stage,
        seconds,
        plan.role(part.role).peak,
        _has_gpus(plan),
        disks.training_disk(config, part, steps),
        note,
        hours.assumptions_of(config, part.stage) if seconds else (),
    )


def _ppo(plan: Plan) -> StageEstimate:
    config, time = plan.config, plan.time
    roles = [role for role in plan.roles if role.role in _PPO]
    seconds, note = None, ""
    if time is None:
        is_unplaced = _has_gpus(plan) and not plan.places
        note = "its workers do not fit" if is_unplaced else _speed_unknown(plan)
    else:
        evaluations = 1 + config.ppo.iterations // config.ppo.eval_every
        one = _evaluation(plan, config.ppo.eval_prompts)
        start = hours.start_seconds(config, plan.models.tuned.shape)
        seconds = as_range(
            start[end] + config.ppo.iterations * time.iteration[end] + evaluations * one[end]
            for end in (0, 1)
        )
    return StageEstimate(
        "ppo",
        seconds,
        _fullest(plan, roles, on_gpus(roles, plan.places).values()),
        _has_gpus(plan),
        disks.ppo_disk(config, plan.models),
        note,
        hours.assumptions_of(config, "ppo") if seconds else (),
        disks.recorded(config),
    )


def _rank(plan: Plan) -> StageEstimate:
    config, setting = plan.config, _setting(plan)
    roles = [planned_role(setting, demand) for demand in held_at_once(config, ["rank"])["rank"]]
    num_pairs = config.rank.num_pairs
    note = f"{config.rank.answers} verdicts of people, whose time is not known"
    if _is_fast(setting):
        best, worst = hours.pair_seconds(setting, num_pairs)
        note += f"; sampling {num_pairs} pairs takes {best / 60:,.0f} to {worst / 60:,.0f} minutes"
    return StageEstimate(
        "rank",
        None,
        _fullest(plan, roles, [[role] for role in roles if role.gpus]),
        _has_gpus(plan),
        disks.pairs_disk(config),
        note,
    )


def _compare(plan: Plan) -> StageEstimate:
    config, setting = plan.config, _setting(plan)
    demands = held_at_once(config, ["evaluate"])["evaluate"]
    roles = [planned_role(setting, demand) for demand in demands]
    places = fit(demands, plan.nodes) if _has_gpus(plan) else None
    trained = [name for name in ("dpo", "ppo") if name in config.run.stages]
    num_models = len({"sft", *(config.evaluate.models or trained)})
    seconds = hours.comparison_seconds(setting, num_models) if _is_fast(setting) else None
    return StageEstimate(
        "evaluate",
        seconds,
        _fullest(plan, roles, on_gpus(roles, places or ()).values()),
        _has_gpus(plan),
        disks.comparison_disk(config, num_models),
        "" if seconds else _speed_unknown(plan),
        hours.assumptions_of(config, "evaluate") if seconds else (),
    )


def _report(plan: Plan) -> StageEstimate:
    size = (disks.REPORT, disks.REPORT)
    seconds = hours.report_seconds(plan.config)
    return StageEstimate("report", seconds, None, False, Disk(size, size))


_OTHERS = {
    "prepare": _prepare,
    "rank": _rank,
    "ppo": _ppo,
    "evaluate": _compare,
    "report": _report,
}
_PPO = ("policy", "critic", "reference", "reward", "generator", "driver")


def _evaluation(plan: Plan, num_prompts: int) -> Range:
    setting = _setting(plan)
    known = _is_fast(setting)
    return hours.evaluation_seconds(setting, num_prompts) if known else (0.0, 0.0)


def _setting(plan: Plan) -> Setting:
    kinds = kinds_of(plan.config, plan.nodes, plan.places) if _has_gpus(plan) else {}
    return Setting(plan.config, plan.models, kinds)


def _is_fast(setting: Setting) -> bool:
    """Return whether the speed of the generators' GPUs is known."""
    kind = setting.kinds.get("generator")
    return kind is not None and kind.bf16_tflops > 0


def _fullest(
    plan: Plan, roles: Sequence[PlannedRole], sharing: Iterable[Sequence[PlannedRole]]
) -> float:
    """Return the most bytes on one GPU, or of one process without GPUs or where none is placed."""
    turns = plan.config.placement.turns
    return max((together(held, turns) for held in sharing), default=0.0) or max(
        role.peak for role in roles if role.gpus or not _has_gpus(plan)
    )


def _has_gpus(plan: Plan) -> bool:
    return any(node.gpus for node in plan.nodes)


def _unread(plan: Plan, part: Trained, kind: GpuKind | None) -> str:
    note = f"{part.stage}.epochs is set, and its rows are not known before they are read"
    if kind is None or not kind.bf16_tflops:
        return note
    steps = max(1, round(TOKENS / tokens_per_step(plan.config, part)))
    once, twice = (hours.training_seconds(plan.config, part, kind, n * steps) for n in (1, 2))
    best, worst = ((twice[end] - once[end]) / 3600 for end in (0, 1))
    return f"{note}; {TOKENS:,.0f} tokens of them take {best:,.2f} to {worst:,.2f} hours"


def _speed_unknown(plan: Plan) -> str:
    what = "GPUs" if _has_gpus(plan) else "CPUs"
    return f"the speed of its {what} is not known"
