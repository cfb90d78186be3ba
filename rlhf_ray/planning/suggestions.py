"""Other configs for the same job: the smallest changes that make it fit, and the best layouts."""

import math
import shlex
import textwrap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from rlhf_ray.config import Config
from rlhf_ray.config.section import is_list, is_mapping
from rlhf_ray.config.stages import SUPERVISED
from rlhf_ray.errors import ConfigError
from rlhf_ray.planning.layout_options import Change, Space, changed, copied
from rlhf_ray.planning.layouts import (
    Costs,
    Found,
    costs_of,
    front,
    gpus_of,
    is_valid,
    no_worse,
    planned,
)
from rlhf_ray.planning.memory import GB, is_offloaded
from rlhf_ray.planning.prediction import Plan, on_gpus, prediction, together
from rlhf_ray.planning.role_times import Range

BASE_AS_REFERENCE: Change = {"reference.kind": "policy_base", "reference.num_workers": 1}
"""The policy's base also serves as the reference."""

WHOLE_BASE: Change = {"model.quantization": "none"}
"""Lets learners compute faster and take turns; it changes what is learnt."""
MOST_LAYOUTS = 5
"""Most layouts that are listed for a base."""
LEAST_SAVED = 0.05
"""Share of the days or GPU-hours that a layout, or one of its changes, must save to be listed: the
assumptions are no finer."""

MAX_SINGLE_CHANGES = 4
"""Most single changes that are suggested, where each alone makes it fit."""


def fitting_changes(plan: Plan) -> list[Change]:
    """Return changes that each make the config fit, the cheapest first; each has been planned.

    Single changes where any is enough; else one that joins several, none of which can be left out;
    else the fastest layout with the same base; none where that does not fit either.
    """
    candidates = [*_change_candidates(plan.config)]
    new = Space(plan.config, plan.models, plan.nodes, ()).differing
    single = [new(change) or {} for change in candidates if _missing(plan, [change]) == 0]
    if single:  # each without those that need more than another one
        least = [one for one in single if not any(o.items() < one.items() for o in single)]
        return least[:MAX_SINGLE_CHANGES]
    helpful, still_missing = _helping(plan, candidates)
    if still_missing:
        return [layout.changes for layout in best_layouts(plan) if layout.learns_the_same][:1]
    return [new(_joined(_needed(plan, helpful))) or {}]


def _helping(plan: Plan, candidates: Sequence[Change]) -> tuple[list[Change], float]:
    """Return changes that each reduce the shortage further, and the bytes that are still short."""
    helpful: list[Change] = []
    least = plan.missing
    for change in candidates:
        missing = _missing(plan, [*helpful, change])
        if missing < least:
            helpful.append(change)
            least = missing
    return helpful, least


def _needed(plan: Plan, helpful: Sequence[Change]) -> list[Change]:
    """Drop the changes that it fits without, trying the most expensive first."""
    kept = list(helpful)
    for change in reversed(helpful):
        rest = [other for other in kept if other is not change]
        if _missing(plan, rest) == 0:
            kept = rest
    return kept


def _joined(changes: Sequence[Change]) -> Change:
    return {key: value for change in changes for key, value in change.items()}


def _missing(plan: Plan, changes: Sequence[Change]) -> float:
    """Return the bytes that are short with these changes; infinity if the config is invalid."""
    try:
        return prediction(changed(plan.config, _joined(changes)), plan.nodes).missing
    except ConfigError:
        return math.inf


def _change_candidates(config: Config) -> Iterator[Change]:
    """Yield changes, from those that cost a little time to those that change what is learnt."""
    yield from _recomputed(config)
    yield from _smaller_passes(config)
    yield from _divided(config)
    yield from _spread(config)
    yield from _fewer(config)
    yield from _smaller_models(config)


def _recomputed(config: Config) -> Iterator[Change]:
    for name in (*_stages(config), *_learners(config)):
        if not getattr(config, name).gradient_checkpointing:
            yield {f"{name}.gradient_checkpointing": True}


def _smaller_passes(config: Config) -> Iterator[Change]:
    tokens = config.ppo.max_tokens_per_micro_batch if _learners(config) else 0
    longest = config.rollout.max_prompt_tokens + config.rollout.max_tokens
    while tokens > longest:
        tokens = max(tokens // 2, longest)
        yield {"ppo.max_tokens_per_micro_batch": tokens}
    for name in _stages(config):
        stage = getattr(config, name)
        accumulated = stage.trainer.get("gradient_accumulation_steps", 1)
        while accumulated < stage.batch_size // stage.train_workers:
            accumulated *= 2
            yield {f"{name}.trainer.gradient_accumulation_steps": accumulated}


def _divided(config: Config) -> Iterator[Change]:
    if config.model.quantization != "none" or config.cluster.mode == "inline":
        return
    for name in _stages(config):
        stage = getattr(config, name)
        for number in range((stage.zero_stage or 1) + 1, 4 if stage.train_workers > 1 else 0):
            yield {f"{name}.zero_stage": number}
        if not is_offloaded(zero := stage.deepspeed.get("zero", {}), "optimizer"):
            further = {**stage.deepspeed, "zero": {**zero, "offload_optimizer": {"device": "cpu"}}}
            yield {f"{name}.zero_stage": 3, f"{name}.deepspeed": further}


def _spread(config: Config) -> Iterator[Change]:
    if not _learners(config):
        return
    size = config.generators.tensor_parallel_size
    for times in (2, 4, 8):
        yield {"generators.tensor_parallel_size": size * times}
    if config.reference.kind == "own":
        yield BASE_AS_REFERENCE
    for role in _learners(config):
        if getattr(config, role).zero_stage < 3:
            yield {f"{role}.zero_stage": 3}


def _fewer(config: Config) -> Iterator[Change]:
    counts = {
        f"{name}.train_workers": getattr(config, name).train_workers for name in _stages(config)
    }
    if learners := _learners(config):
        counts |= {
            "generators.num": config.generators.num,
            "reward.num_workers": config.reward.num_workers,
            "reference.num_workers": config.reference.num_workers,
            **{f"{role}.num_ranks": getattr(config, role).num_ranks for role in learners},
        }
    for key, count in counts.items():
        while count > 1:
            count //= 2
            yield {key: count}
    for share in (0.5, 0.25):
        if learners and share < config.placement.gpus_of("policy"):
            utilization = {"rollout.engine_args.gpu_memory_utilization": share}
            yield {"placement.gpus": share, **utilization}


def _smaller_models(config: Config) -> Iterator[Change]:
    if config.model.dtype == "float32":
        yield {"model.dtype": "bfloat16"}
    stages = ((name, getattr(config, name)) for name in _stages(config))
    full = {f"{n}.tuning": "lora" for n, each in stages if getattr(each, "tuning", "") == "full"}
    if full:
        yield full
    smaller = {"none": ("int8", "nf4"), "int8": ("nf4",), "nf4": ()}
    unsharded: dict[str, object] = {
        f"{role}.zero_stage": 2
        for role in ("policy", "critic")
        if getattr(config, role).zero_stage == 3
    }
    for name in _stages(config):  # also where another change sets them
        unsharded |= {f"{name}.zero_stage": None, f"{name}.deepspeed": {}}
    for quantization in smaller[config.model.quantization]:
        yield {"model.quantization": quantization, **full, **unsharded}


def _stages(config: Config) -> list[str]:
    """Return the supervised stages that train."""
    return [
        name
        for name in SUPERVISED
        if name in config.run.stages and config.external_model(name) is None
    ]


def _learners(config: Config) -> list[str]:
    """Return PPO's learner groups, if it runs."""
    if "ppo" not in config.run.stages:
        return []
    return ["policy", "critic"] if config.may_have_critic else ["policy"]


@dataclass(frozen=True)
class Layout:
    """One layout of PPO's roles."""

    changes: Change
    """Changes of the given config; empty for the given layout."""
    gpus: int
    """Number of GPUs with a role on them."""
    days: Range
    """See `TimeEstimate`."""
    gpu_hours: float
    """Hours of PPO times those GPUs; at the range's midpoint."""
    idle_gpu_hours: float
    """See `TimeEstimate`."""
    fullest: float
    """Bytes that are in use at a time on the GPU with most of them."""
    free: int
    """GPUs of the cluster that no role is on."""
    learns_the_same: bool = True
    """Whether what is learnt does not change."""


def best_layouts(
    plan: Plan, kept: Collection[str] = (), chosen: Change | None = None
) -> list[Layout]:
    """Return the given layout if it fits, then layouts that cost fewer days or fewer GPU-hours.

    Those with the same base come first, then those with one that is not quantised; the fastest
    first. None where the speed of the GPUs is unknown, or without PPO.

    Args:
        plan: of the given layout, as predicted.
        kept: keys that stay as they are.
        chosen: keys that the given layout has beyond the config; all others list them as well.
    """
    config, nodes = plan.config, plan.nodes
    kinds = [node.gpu_kind for node in nodes if node.gpus]
    is_ppo = "ppo" in config.run.stages and config.cluster.runs_on_ray
    if not is_ppo or not kinds or None in kinds:
        return []
    known = [costs_of(plan)] if plan.fits and plan.time else []
    limit = known[0][0] if known else math.inf
    found = [_layout({}, plan) for _ in known]
    for base in ({}, WHOLE_BASE):
        space = Space(copied(config, base), plan.models, nodes, kept)
        if base and not Space(config, plan.models, nodes, kept).differing(base):
            continue
        may_be_late = plan.late_calls is not None
        few = _few(front(space, known, LEAST_SAVED, may_be_late), limit)
        for each in few:
            rivals = [costs_of(other) for _, other in few if other is not each[1]]
            change, other = _plainer(space, each, known, rivals, may_be_late)
            if not any(no_worse(costs, costs_of(other), LEAST_SAVED) for costs in known):
                known.append(costs_of(other))
                found.append(_layout({**(chosen or {}), **base, **change}, other))
    return found


def _few(found: Sequence[Found], limit: float) -> list[Found]:
    """Return some layouts: the fastest, the one with the fewest GPU-hours, and some between.

    Args:
        found: the fastest first.
        limit: seconds of an iteration of the given layout, which only the last may exceed.
    """
    chosen: list[Found] = []
    for each in found:
        costs = [costs_of(other) for _, other in chosen]
        if not any(no_worse(other, costs_of(each[1]), LEAST_SAVED) for other in costs):
            chosen.append(each)
    quick = [each for each in chosen if costs_of(each[1])[0] <= limit]
    slots = min(len(quick), MOST_LAYOUTS - 1)
    some = [quick[round(n * (len(quick) - 1) / max(1, slots - 1))] for n in range(slots)]
    return some + [each for each in chosen[-1:] if each not in some]


def _plainer(
    space: Space, found: Found, known: Sequence[Costs], rivals: Sequence[Costs], may_be_late: bool
) -> Found:
    """Return a layout without the changes that save little, whole sections first.

    It stays better than the known ones, and no rival becomes better in both costs.
    """
    change, best = found[0], costs_of(found[1])
    sections = dict.fromkeys(key.partition(".")[0] for key in change)
    for name in (*sections, *change):
        rest = {k: value for k, value in found[0].items() if not f"{k}.".startswith(f"{name}.")}
        plan = planned(space, rest, may_be_late) if len(rest) < len(found[0]) else None
        if plan is None or not no_worse(costs_of(plan), best, LEAST_SAVED):
            continue
        beaten = any(no_worse(costs, costs_of(plan), LEAST_SAVED) for costs in known)
        beaten = beaten or any(no_worse(costs, costs_of(plan)) for costs in rivals)
        if not beaten and is_valid(space, rest):
            found = (rest, plan)
    return found


def _layout(changes: Change, plan: Plan) -> Layout:
    assert plan.time is not None
    gpus, hours = len(gpus_of(plan.places)), plan.config.ppo.iterations / 3600
    held = on_gpus(plan.roles, plan.places).values()
    return Layout(
        changes,
        gpus,
        plan.time.days,
        costs_of(plan)[1] * hours,
        plan.time.idle_gpu_hours,
        max(together(roles, plan.config.placement.turns) for roles in held),
        sum(node.gpus for node in plan.nodes) - gpus,
        WHOLE_BASE.items().isdisjoint(changes.items()),
    )


def layout_table(layouts: Sequence[Layout], width: int) -> Iterator[str]:
    """Yield the lines of a table of layouts, each with its overrides."""
    yield ""
    if not layouts:
        yield "no layouts to compare: that takes PPO, and enough GPUs of a known kind"
        return
    columns = f"{'days of PPO':>18}{'GPU-hours':>12}{'GPUs':>7}{'free':>7}{'GB a GPU':>12}"
    yield f"{'layout, as predicted':<44}{columns}"
    for number, layout in enumerate(layouts, start=bool(layouts[0].changes)):
        name = f"{number}" if layout.changes else "as configured"
        name += "" if layout.learns_the_same else ", which changes what is learnt"
        days = f"{layout.days[0]:,.2f} to {layout.days[1]:,.2f}"
        cells = f"{days:>18}{layout.gpu_hours:>12,.0f}{layout.gpus:>7}{layout.free:>7}"
        yield f"{name:<44}{cells}{layout.fullest / GB:>12,.1f}"
        keys = " ".join(override.replace(" ", "\0") for override in overrides(layout.changes))
        for line in textwrap.wrap(keys, width - 2, break_long_words=False, break_on_hyphens=False):
            yield "  " + line.replace("\0", " ")
    if not any(layout.changes for layout in layouts):
        yield f"no other saves {LEAST_SAVED:.0%} of the days or of the GPU-hours"


def overrides(change: Change) -> list[str]:
    """Return a change as command-line overrides, for a shell."""
    return [shlex.quote(f"{key}={_yaml(value)}") for key, value in change.items()]


def _yaml(value: object) -> str:
    if is_list(value):
        return f"[{','.join(map(_yaml, value))}]"
    if is_mapping(value):
        return f"{{{', '.join(f'{key}: {_yaml(each)}' for key, each in value.items())}}}"
    return str(value).lower() if isinstance(value, bool) else str(value)
