"""Estimate how long a stage takes, besides PPO's iterations: from FLOPs, bandwidths and rates.

Operations are those of `role_times`. A stage also starts its processes and loads its model.
"""

import math
from collections.abc import Callable, Mapping

from rlhf_ray.config import Config
from rlhf_ray.placement.hardware import GpuKind
from rlhf_ray.placement.layout import RUN_MODELS
from rlhf_ray.planning.memory import BYTES, Shape
from rlhf_ray.planning.role_times import (
    ASSUMPTIONS,
    Range,
    as_range,
    learners_mfu,
    response_tokens,
    sample_seconds,
)
from rlhf_ray.planning.roles import Setting
from rlhf_ray.planning.trainings import (
    Trained,
    section,
    sequences_of_row,
    tokens_of_sequence,
    tokens_per_step,
)

SCORED = "scorers and prefill, MFU"
UNPACKED = "length of texts that are not packed, as a share of the longest"
STARTED = "starting a stage's processes, seconds"
READ = "GB/s from a model's folder"
_OF_TRAINING = ("learners", "scorers", "starting", READ)
_OF_EVALUATE = ("scorers", "decoding", "response length", "all-reduce", "starting", READ)
_OF_NO_ITERATION = ("prepare", UNPACKED)
"""Beginnings of the names of assumptions."""

REPORTED_S: Mapping[str, Range] = {"start": (1.0, 10.0), "iteration": (6e-4, 2e-3)}
"""Seconds of the report: measured at 10,000 iterations, and three times that."""


def num_steps(config: Config, part: Trained) -> int | None:
    """Return the optimizer steps of a stage; None: its rows are not known before they are read.

    With ``max_pairs`` there are at most so many.
    """
    settings = section(config, part)
    if settings.epochs is None:
        return settings.steps
    rows = getattr(settings, "max_pairs", None)
    return None if rows is None else math.ceil(settings.epochs * rows / settings.batch_size)


def training_seconds(config: Config, part: Trained, kind: GpuKind, steps: int) -> Range:
    """Return the seconds of a supervised stage: its steps, and evaluations on held-out rows.

    A token takes 6 operations a parameter, 4 where an adapter alone is trained, 2 more to recompute
    activations (Kaplan et al. 2020, arXiv:2001.08361, section 2.1), and with dpo 2 for the base's
    log-probs; an evaluation 2. They are held before the first step, after the last, and between.
    """
    settings = section(config, part)
    passes = (6 if part.lora is None else 4) + 2 * settings.gradient_checkpointing
    forward = 4 if part.stage == "dpo" else 2
    passes += forward - 2
    every = settings.eval_every
    between = 0 if every is None else settings.epochs or 1 if every == "epoch" else steps // every
    longest = sequences_of_row(config, part) * tokens_of_sequence(config, part)
    held_out = settings.eval_rows * longest
    peak = settings.train_workers * kind.bf16_tflops * 1e12
    size = part.shape.size.parameters

    def seconds(end: int) -> float:
        trained = passes * size * steps * tokens_per_step(config, part) / learners_mfu(config, end)
        evaluated = forward * size * (2 + between) * held_out / ASSUMPTIONS[SCORED][end]
        return _share_of_length(config, part, end) * (trained + evaluated) / peak

    return _sum(_of_ends(seconds), start_seconds(config, part.model.shape))


def start_seconds(config: Config, shape: Shape) -> Range:
    """Return the seconds in which a stage's processes start and load a model."""
    weights = shape.size.parameters * BYTES[config.model.dtype] / 1e9
    return _of_ends(lambda end: ASSUMPTIONS[STARTED][end] + weights / ASSUMPTIONS[READ][end])


def pair_seconds(setting: Setting, num_pairs: int) -> Range:
    """Return the seconds in which generators start and one model answers prompts twice."""
    config = setting.config
    mine = math.ceil(2 * num_pairs / config.generators.num)
    answered = _of_ends(
        lambda end: sample_seconds(setting, mine, response_tokens(config, end), end)
    )
    return _sum(start_seconds(config, setting.models.tuned.shape), answered)


def evaluation_seconds(setting: Setting, num_prompts: int) -> Range:
    """Return the seconds in which one model answers held-out prompts and its answers are scored."""
    config = setting.config
    mine = math.ceil(num_prompts / config.generators.num)
    scorers = sum(isinstance(source, RUN_MODELS) for source in config.rewards)
    kind = setting.kinds.get("reward")

    def seconds(end: int) -> float:
        answered = sample_seconds(setting, mine, response_tokens(config, end), end)
        if kind is None or not scorers:
            return answered
        tokens = num_prompts * (config.rollout.max_prompt_tokens + response_tokens(config, end))
        operations = 2 * scorers * setting.models.reward.shape.size.parameters * tokens
        rate = config.reward.num_workers * kind.bf16_tflops * 1e12 * ASSUMPTIONS[SCORED][end]
        return answered + operations / rate

    return _of_ends(seconds)


def comparison_seconds(setting: Setting, num_models: int) -> Range:
    """Return the seconds of evaluate: answers, scores, and perplexities of reference answers.

    One worker measures perplexity, at best none, where rows have no reference answers.
    """
    config = setting.config
    one = evaluation_seconds(setting, config.evaluate.num_prompts)
    kind = setting.kinds["generator"]
    assert kind is not None
    tokens = config.evaluate.num_prompts * config.model.max_length
    operations = 2 * setting.models.tuned.shape.size.parameters * tokens
    measured = operations / (kind.bf16_tflops * 1e12 * ASSUMPTIONS[SCORED][1])
    started = start_seconds(config, setting.models.tuned.shape)
    return _sum(started, (num_models * one[0], num_models * (one[1] + measured)))


def report_seconds(config: Config) -> Range:
    """Return the seconds of the report, which grow with PPO's iterations."""
    iterations = config.ppo.iterations if "ppo" in config.run.stages else 0
    return _of_ends(
        lambda end: REPORTED_S["start"][end] + iterations * REPORTED_S["iteration"][end]
    )


def _share_of_length(config: Config, part: Trained, end: int) -> float:
    return 1.0 if _packs_texts(section(config, part)) else ASSUMPTIONS[UNPACKED][end]


def _packs_texts(settings: object) -> bool:
    """Return whether a stage's section packs texts into blocks; pairs are never packed."""
    return getattr(settings, "packing", "none") != "none"


def _of_ends(seconds: Callable[[int], float]) -> Range:
    return as_range(seconds(end) for end in (0, 1))


def _sum(*ranges: Range) -> Range:
    return as_range(sum(each[end] for each in ranges) for end in (0, 1))


def assumptions_of(config: Config, stage: str) -> tuple[str, ...]:
    """Return the names of the assumptions that a stage's hours depend on."""
    if stage == "ppo":
        return tuple(name for name in ASSUMPTIONS if not name.startswith(_OF_NO_ITERATION))
    if stage == "evaluate":
        return tuple(name for name in ASSUMPTIONS if name.startswith(_OF_EVALUATE))
    its = (*_OF_TRAINING, *(() if _packs_texts(getattr(config, stage)) else (UNPACKED,)))
    return tuple(name for name in ASSUMPTIONS if name.startswith(its))
